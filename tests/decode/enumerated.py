"""The distribution of an output's first three tokens, enumerated, and what slots drew to compare with it."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats

from jaxinfer.decode import sampling
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.slots import SlotState, empty_slots
from tests.decode.placed import placed

VOCAB, TOKENS, SLOTS, TEXT = 4, 3, 2048, 48
NOTHING = -1e9  # a logit that no draw takes
REQUESTS = {
    "temperature": SamplingParams(temperature=0.8, max_tokens=40),
    "filters and penalties": SamplingParams(
        temperature=1.3, top_k=3, top_p=0.9, presence_penalty=0.8, frequency_penalty=-0.5, max_tokens=40
    ),
}
MODEL_VV = np.random.default_rng(0).normal(scale=1.5, size=(VOCAB, VOCAB)).astype(np.float32)
MODEL_VV[0, 2] = NOTHING
HALVES_VV = np.where(np.arange(VOCAB) < VOCAB // 2, MODEL_VV, NOTHING).astype(np.float32)
# Logits after each token: of the model, and of the draft.
DRAFT_MODELS = {
    "random": (MODEL_VV, np.random.default_rng(1).normal(scale=2, size=(VOCAB, VOCAB)).astype(np.float32)),
    "uniform": (MODEL_VV, np.zeros((VOCAB, VOCAB), np.float32)),
    "identical": (MODEL_VV, MODEL_VV),
    "disjoint": (HALVES_VV, HALVES_VV[:, ::-1]),
    "deterministic": (MODEL_VV, np.where(np.eye(VOCAB), 0, NOTHING).astype(np.float32)),
}


def needs(params: SamplingParams) -> sampling.Needs:
    return sampling.needs([params])


def start(params: SamplingParams, seed: int, slots: int = SLOTS) -> SlotState:
    """Every slot has the same request, with a seed of its own, and token 0 before its output."""
    state = empty_slots(slots, 1, 1, VOCAB, TEXT)
    rows = packed(params, slots)
    rows["seed_B"] = seed * slots + np.arange(slots, dtype=np.uint32)
    state = replace(
        state,
        active_B=np.ones(slots, bool),
        max_tokens_B=np.full(slots, params.max_tokens, np.int32),
        sampling=replace(state.sampling, **rows),
    )
    return placed(state)


def packed(params: SamplingParams, rows: int) -> dict[str, jax.Array]:
    """What the sampler is told of a request, for so many rows."""
    row = sampling.pack(params, (), 0)
    return {name: jnp.asarray(np.tile(value, (rows,) + (1,) * value.ndim)) for name, value in row.items()}


def outputs(state: SlotState, step: Callable) -> tuple[np.ndarray, float]:
    """The first tokens of every slot [B, TOKENS], and how many of the proposals that might count did."""
    slots = len(state.token_B)
    found_BT, count_B, accepted, proposed = np.zeros((slots, TOKENS), int), np.zeros(slots, int), 0, 0
    while count_B.min() < TOKENS:
        state, sampled, emits_QB = step(state)
        accepted, proposed = accepted + int(emits_QB[1:].sum()), proposed + emits_QB[1:].size
        for tokens_B, emits_B in zip(np.asarray(sampled.tokens_W), np.asarray(emits_QB), strict=True):
            more = np.flatnonzero(emits_B & (count_B < TOKENS))
            found_BT[more, count_B[more]] = tokens_B[more]
            count_B[more] += 1
    return found_BT, accepted / proposed


kept = jax.jit(sampling.kept, static_argnums=3)


def joint(model_VV: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The probability of every three tokens, [V, V, V], from the sampler's of one after the other."""
    paths = np.array(list(product(range(VOCAB), repeat=TOKENS)))
    whole = np.ones(len(paths))
    for index in range(TOKENS):
        before = np.concatenate([np.zeros((len(paths), 1), int), paths], axis=1)[:, index]
        counts_PV = (paths[:, :index, None] == np.arange(VOCAB)).sum(axis=1).astype(np.int32)
        state = replace(
            sampling.empty(len(paths), VOCAB), **packed(params, len(paths)), counts_BV=jnp.asarray(counts_PV)
        )
        kept_PV = kept(jnp.asarray(model_VV[before]), state, jnp.full(len(paths), index, jnp.int32), needs(params))
        whole *= scipy.special.softmax(kept_PV, axis=1)[np.arange(len(paths)), paths[:, index]]
    return whole.reshape((VOCAB,) * TOKENS)


def probability(found_BT: np.ndarray, expected_VVV: np.ndarray) -> float:
    """Of a larger chi-square, where tokens are drawn as expected."""
    observed_VVV = np.zeros_like(expected_VVV)
    np.add.at(observed_VVV, tuple(found_BT.T), 1)
    possible = expected_VVV > 1e-12
    assert not observed_VVV[~possible].any()
    expected = expected_VVV[possible] * len(found_BT)
    chi_square = ((observed_VVV[possible] - expected) ** 2 / expected).sum()
    return float(scipy.stats.chi2.sf(chi_square, possible.sum() - 1))


def assert_uniform(probabilities: list[float]) -> None:
    """As those of chi-squares are where all is as expected; by the test of Kolmogorov and Smirnov."""
    assert min(probabilities) > 1e-4
    assert scipy.stats.kstest(probabilities, "uniform").pvalue > 1e-3

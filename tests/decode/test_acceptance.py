"""Whatever a draft proposes, what is verified has the model's own distribution: of three tokens together."""

from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from jaxinfer.decode import sampling
from jaxinfer.decode.forward import Forward
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.slots import SlotState, empty_slots
from jaxinfer.decode.speculative import verify
from jaxinfer.decode.speculative.autoregressive import draft
from jaxinfer.parallel import make_mesh
from tests.decode.placed import placed

VOCAB, TOKENS, SLOTS, DRAFTS = 4, 3, 2048, 2
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


@dataclass(frozen=True)
class Table(Forward):
    """A model whose logits depend on the token before alone."""

    def __call__(self, params, cache, batch, rows_W):
        return cache, params[0][batch.tokens_T[rows_W]], None, None


TABLE = Table(None, page_size=64, cache_dtype="", attention="")  # pyright: ignore[reportArgumentType]


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(1)):
        yield


def needs(params: SamplingParams) -> sampling.Needs:
    return sampling.needs([params])


def start(params: SamplingParams, seed: int) -> SlotState:
    """Every slot has the same request, with a seed of its own, and token 0 before its output."""
    state = empty_slots(SLOTS, 1, 1, VOCAB)
    rows = packed(params, SLOTS)
    rows["seed_B"] = seed * SLOTS + np.arange(SLOTS, dtype=np.uint32)
    state = replace(
        state,
        active_B=np.ones(SLOTS, bool),
        max_tokens_B=np.full(SLOTS, params.max_tokens, np.int32),
        sampling=replace(state.sampling, **rows),
    )
    return placed(state)


def packed(params: SamplingParams, rows: int) -> dict[str, jax.Array]:
    """What the sampler is told of a request, for so many rows."""
    row = sampling.pack(params, (), 0)
    return {name: jnp.asarray(np.tile(value, (rows,) + (1,) * value.ndim)) for name, value in row.items()}


def speculative_step(
    state: SlotState, model_VV, draft_VV, needs: sampling.Needs, coupled=False, lies=False, drafts=DRAFTS
):
    """A draft that lies says of what it drew that it was from a uniform distribution."""
    return _speculative_step(state, model_VV, draft_VV, lies, needs, coupled, drafts)


@partial(jax.jit, static_argnums=(4, 5, 6))
def _speculative_step(
    state: SlotState, model_VV, draft_VV, lies: jax.Array, needs: sampling.Needs, coupled: bool, drafts: int
):
    proposal, _ = draft(TABLE, [draft_VV], (), state, needs, drafts, catch_up=False, coupled=coupled)
    if not coupled:
        proposal = proposal._replace(kept_BkV=jnp.where(lies, 0.0, proposal.kept_BkV))
    tokens_BQ = jnp.concatenate([state.token_B[:, None], proposal.drafts_Bk], axis=1)
    return verify(state, model_VV[tokens_BQ.reshape(-1)], proposal, needs)[:3]


def outputs(state: SlotState, step) -> tuple[np.ndarray, float]:
    """The first tokens of every slot [B, TOKENS], and how many of the proposals counted."""
    found_BT, count_B, accepted, proposed = np.zeros((SLOTS, TOKENS), int), np.zeros(SLOTS, int), 0, 0
    while count_B.min() < TOKENS:
        state, sampled, emits_QB = step(state)
        accepted, proposed = accepted + int(emits_QB[1:].sum()), proposed + DRAFTS * SLOTS
        for tokens_B, emits_B in zip(np.asarray(sampled.tokens_W), np.asarray(emits_QB), strict=True):
            slots = np.flatnonzero(emits_B & (count_B < TOKENS))
            found_BT[slots, count_B[slots]] = tokens_B[slots]
            count_B[slots] += 1
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


@pytest.mark.parametrize("request_", REQUESTS)
def test_outputs_have_the_distribution_of_the_model(request_):
    """The probabilities of a chi-square are uniform over drafts and seeds."""
    params, found = REQUESTS[request_], []
    for tables in DRAFT_MODELS.values():
        step = lambda state, tables=tables: speculative_step(state, *tables, needs(params))  # noqa: E731
        expected_VVV = joint(tables[0], params)
        found += [probability(outputs(start(params, seed), step)[0], expected_VVV) for seed in range(4)]
    assert min(found) > 1e-4
    assert scipy.stats.kstest(found, "uniform").pvalue > 1e-3


def test_how_many_tokens_are_proposed_changes_no_distribution():
    """Chosen by what was right before, in the same slots: the gate does so for a whole batch."""
    params, found, chosen = REQUESTS["filters and penalties"], [], set()

    class Adapting:
        drafts = 2

        def __init__(self, tables):
            self.tables = tables

        def __call__(self, state):
            state, sampled, emits_QB = speculative_step(state, *self.tables, needs(params), drafts=self.drafts)
            chosen.add(self.drafts)
            self.drafts = 1 + int(emits_QB[:, :3].sum()) % 3
            return state, sampled, emits_QB

    for name in ("random", "uniform", "deterministic"):
        tables = DRAFT_MODELS[name]
        expected_VVV = joint(tables[0], params)
        found += [probability(outputs(start(params, seed), Adapting(tables))[0], expected_VVV) for seed in range(4)]
    assert chosen == {1, 2, 3}
    assert min(found) > 1e-4
    assert scipy.stats.kstest(found, "uniform").pvalue > 1e-3


def test_as_many_proposals_count_as_any_exact_rule_allows():
    """The overlap of both distributions, which is the chance of a proposal that follows a token."""
    params = REQUESTS["temperature"]
    model_VV, draft_VV = DRAFT_MODELS["random"]
    p_VV, q_VV = (scipy.special.softmax(table_VV / params.temperature, axis=1) for table_VV in (model_VV, draft_VV))
    overlap = np.minimum(p_VV, q_VV)
    first = overlap[0].sum()
    both = (overlap[0] * overlap.sum(axis=1)).sum()
    rates = {}
    for coupled in (False, True):
        _, _, emits_QB = speculative_step(start(params, 9), model_VV, draft_VV, needs(params), coupled)
        rates[coupled] = np.asarray(emits_QB[1:]).mean(axis=1)
    margin = 4 * np.sqrt(0.25 / SLOTS)
    np.testing.assert_allclose(rates[False], [first, both], atol=margin)
    # Coupled draws agree less often, at the least (1 - TV) / (1 + TV): Daliri et al. 2024, theorem 2.
    assert first / (2 - first) - margin < rates[True][0] < first


def test_a_draft_like_the_model_is_always_right():
    params = REQUESTS["filters and penalties"]
    step = lambda state: speculative_step(state, MODEL_VV, MODEL_VV, needs(params))  # noqa: E731
    assert outputs(start(params, 5), step)[1] == 1.0


def test_a_draft_that_lies_about_its_draws_is_found():
    """The tests above can fail: with probabilities that are not those of the draws, outputs are others."""
    params = REQUESTS["temperature"]
    model_VV, draft_VV = DRAFT_MODELS["random"]
    step = lambda state: speculative_step(state, model_VV, draft_VV, needs(params), lies=True)  # noqa: E731
    assert probability(outputs(start(params, 0), step)[0], joint(model_VV, params)) < 1e-6


def test_greedy_rows_take_what_is_likeliest():
    """Also beside others that draw."""
    params = REQUESTS["temperature"]
    greedy_B = np.arange(SLOTS) % 2 == 0
    temperature_B = np.where(greedy_B, 0, 1).astype(np.float32)
    state = start(params, 3)
    state = placed(replace(state, sampling=replace(state.sampling, temperature_B=temperature_B)))
    model_VV, draft_VV = DRAFT_MODELS["random"]
    found_BT, _ = outputs(state, lambda state: speculative_step(state, model_VV, draft_VV, needs(params)))
    expected, token = [], 0
    for _ in range(TOKENS):
        token = int(np.argmax(MODEL_VV[token]))
        expected.append(token)
    assert (found_BT[greedy_B] == expected).all()
    assert not (found_BT[~greedy_B] == expected).all()

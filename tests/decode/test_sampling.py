"""The sampler does what its NumPy definitions say, draws from the right distribution, and never looks sideways."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer.decode.sampling import (
    Needs,
    SamplingState,
    adjust,
    count,
    empty,
    install,
    needs,
    pack,
    sample,
    truncate,
)
from jaxinfer.decode.sampling_params import SamplingParams
from tests.decode.rows import stacked

FULL, RANDOM, GREEDY = (Needs(level, 0) for level in ("full", "random", "greedy"))
EOS = (2,)

sample_jit = jax.jit(sample, static_argnums=3)
install_jit = jax.jit(install)
adjust_jit = jax.jit(adjust)
truncate_jit = jax.jit(truncate)


def states(batch: list[SamplingParams], vocab: int, seeds=None) -> SamplingState:
    """A state with one request in each slot, none of them with a prompt or an output."""
    seeds = range(len(batch)) if seeds is None else seeds
    rows = stacked([pack(params, EOS, int(seed)) for params, seed in zip(batch, seeds, strict=True)])
    return dataclasses.replace(empty(len(batch), vocab), **rows)


def random_logits(slots: int, vocab: int, seed: int, *, ties: bool = False) -> np.ndarray:
    logits_BV = np.random.default_rng(seed).normal(0, 2, (slots, vocab))
    return (np.round(logits_BV) if ties else logits_BV).astype(np.float32)


def indices(slots: int, index: int = 0) -> jax.Array:
    return jnp.full(slots, index, jnp.int32)


def filtered(logits_V: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """The definition: which tokens stay. Equal logits stay or go together."""
    logits_V = logits_V.astype(np.float64)
    p_V = scipy.special.softmax(logits_V)
    kept_V = p_V >= min_p * p_V.max()
    if top_k > 0:
        likelier_V = (logits_V[None, :] > logits_V[:, None]).sum(axis=1)
        kept_V &= likelier_V < top_k
    if top_p < 1:
        left_V = np.where(kept_V, p_V, 0) / p_V[kept_V].sum()
        likelier_mass_V = (left_V[None, :] * (logits_V[None, :] > logits_V[:, None])).sum(axis=1)
        kept_V &= likelier_mass_V < top_p
    return kept_V


GRID = [
    dict(zip(("top_k", "top_p", "min_p"), values, strict=True))
    for values in itertools.product((-1, 0, 1, 3, 10, 1000), (1.0, 0.95, 0.5, 1e-50), (0.0, 0.02, 0.3, 1.0))
]


@pytest.mark.parametrize("ties", [False, True])
def test_filters_keep_what_their_definition_keeps(ties):
    logits_BV = random_logits(len(GRID), 50, seed=1, ties=ties)
    logits_BV[:, 7] = -np.inf
    state = states([SamplingParams(**filters) for filters in GRID], 50)
    kept_BV = np.asarray(truncate_jit(logits_BV, state))
    expected_BV = [filtered(row, **filters) for row, filters in zip(logits_BV, GRID, strict=True)]
    np.testing.assert_array_equal(kept_BV, np.where(expected_BV, logits_BV, -np.inf))
    assert (kept_BV.argmax(axis=1) == logits_BV.argmax(axis=1)).all()


def test_top_p_1_keeps_even_the_tokens_that_rounding_would_lose():
    logits_BV = random_logits(4, 3000, seed=2)
    logits_BV[:, 17] = 60  # in float32, all of the probability
    state = states([SamplingParams(top_k=top_k) for top_k in (0, -1, 3000, 4000)], 3000)
    np.testing.assert_array_equal(truncate_jit(logits_BV, state), logits_BV)


def test_penalties_biases_and_minimum_length_follow_their_definition():
    vocab, rng = 40, np.random.default_rng(3)
    batch = [
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(repetition_penalty=0.6),
        SamplingParams(presence_penalty=1.5),
        SamplingParams(frequency_penalty=-0.75),
        SamplingParams(logit_bias={3: 5.0, 39: -100.0, 0: 1.5}),
        SamplingParams(min_tokens=3, stop_token_ids=[5, 39]),
        SamplingParams(min_tokens=3, stop_token_ids=[5], ignore_eos=True),
        SamplingParams(min_tokens=2, stop_token_ids=[5]),
        SamplingParams(
            min_tokens=3,
            repetition_penalty=1.3,
            presence_penalty=0.5,
            frequency_penalty=0.25,
            logit_bias={2: 1.0, 7: -2.0},
        ),
    ]
    logits_BV = random_logits(len(batch), vocab, seed=4)
    prompts_BT = rng.integers(0, vocab, (len(batch), 12)).astype(np.int32)
    prompts_BT[:, 9:] = -1
    outputs_BT = rng.integers(0, 10, (len(batch), 20)).astype(np.int32)
    state = empty(len(batch), vocab)
    rows = stacked([pack(params, EOS, slot) for slot, params in enumerate(batch)])
    state = install_jit(state, jnp.arange(len(batch)), rows, prompts_BT, outputs_BT[:, :8])
    for tokens_B in outputs_BT[:, 8:].T:  # the first ones came before the request was interrupted
        state = count(state, jnp.asarray(tokens_B), jnp.ones(len(batch), jnp.bool_))

    expected_BV = logits_BV.astype(np.float64)
    for x_V, params, prompt_T, output_T in zip(expected_BV, batch, prompts_BT, outputs_BT, strict=True):
        if params.min_tokens > 2:
            x_V[[*(params.stop_token_ids or ()), *(() if params.ignore_eos else EOS)]] = -np.inf
        for token, bias in (params.logit_bias or {}).items():
            x_V[token] += bias
        for token in {*prompt_T.tolist(), *output_T.tolist()} - {-1}:
            x_V[token] *= params.repetition_penalty if x_V[token] < 0 else 1 / params.repetition_penalty
        for token in output_T:
            x_V[token] -= params.frequency_penalty
        for token in set(output_T.tolist()):
            x_V[token] -= params.presence_penalty
    actual_BV = adjust_jit(logits_BV, state, indices(len(batch), 2))
    # A handful of roundings of float32 numbers below 128.
    np.testing.assert_allclose(actual_BV, expected_BV, rtol=0, atol=8 * 128 * np.finfo(np.float32).eps)


SLOTS, VOCAB = 8000, 12


def copies(params: SamplingParams, vary: str = "seed") -> tuple[SamplingState, jax.Array]:
    """One request in all of `SLOTS` slots, with seeds that differ or at token indices that differ."""
    rows = stacked([pack(params, EOS, 7)] * SLOTS)
    numbers_B = np.arange(SLOTS)
    seeds = {"seed_B": jnp.asarray(numbers_B, jnp.uint32)} if vary == "seed" else {}
    index_B = jnp.asarray(numbers_B if vary == "token index" else 0 * numbers_B, jnp.int32)
    return dataclasses.replace(empty(SLOTS, VOCAB), **rows | seeds), index_B


def test_stop_tokens_are_barred_exactly_until_min_tokens():
    logits_V = np.zeros(VOCAB, np.float32)
    logits_V[[EOS[0], 6]] = 50, 49
    state, index_B = copies(SamplingParams(min_tokens=3, stop_token_ids=[6]), vary="token index")
    tokens_B = np.asarray(sample_jit(np.tile(logits_V, (SLOTS, 1)), state, index_B, FULL).tokens_W)
    assert not set(tokens_B[:3].tolist()) & {EOS[0], 6}
    assert set(tokens_B[3:].tolist()) == {EOS[0], 6}


def test_masked_tokens_are_never_drawn():
    logits_V = np.full(VOCAB, -np.inf, np.float32)
    logits_V[[4, 11]] = 0.0
    for params in (SamplingParams(temperature=100.0), SamplingParams(top_p=0.99, min_p=0.1, presence_penalty=1.0)):
        tokens_B = sample_jit(np.tile(logits_V, (SLOTS, 1)), *copies(params), FULL).tokens_W
        assert set(np.asarray(tokens_B).tolist()) == {4, 11}


DISTRIBUTIONS = [
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.7),
    SamplingParams(top_k=4),
    SamplingParams(top_p=0.8),
    SamplingParams(min_p=0.2),
    SamplingParams(temperature=1.5, top_k=8, top_p=0.9, min_p=0.05, logit_bias={0: 1.0}),
]


@pytest.mark.parametrize("params", DISTRIBUTIONS, ids=range(len(DISTRIBUTIONS)))
@pytest.mark.parametrize("vary", ["seed", "token index"])
def test_draws_have_the_distribution(params, vary):
    logits_V = random_logits(1, VOCAB, seed=5)[0] / 2
    target_V = logits_V.astype(np.float64)
    for token, bias in (params.logit_bias or {}).items():
        target_V[token] += bias
    target_V /= params.temperature
    kept_V = filtered(target_V, params.top_k, params.top_p, params.min_p)
    p_V = scipy.special.softmax(np.where(kept_V, target_V, -np.inf))

    tokens_B = sample_jit(np.tile(logits_V, (SLOTS, 1)), *copies(params, vary), needs([params])).tokens_W
    observed_V = np.bincount(tokens_B, minlength=VOCAB)
    assert observed_V[~kept_V].sum() == 0
    expected_V = SLOTS * p_V[kept_V]
    chi_square = ((observed_V[kept_V] - expected_V) ** 2 / expected_V).sum()
    assert scipy.special.chdtrc(kept_V.sum() - 1, chi_square) > 1e-3  # the probability of a larger one


def test_neighbours_place_and_level_do_not_change_a_token():
    slots, vocab, rng = 24, 1000, np.random.default_rng(6)
    plain = [SamplingParams(temperature=float(t)) for t in rng.uniform(0.3, 2, slots)]
    adjusted = [
        SamplingParams(temperature=1.1, presence_penalty=1.0, frequency_penalty=0.5, min_tokens=4),
        SamplingParams(temperature=0, repetition_penalty=1.2, logit_bias={9: 3.0}),
    ] * 4
    plain[: len(adjusted)] = adjusted
    rich = [
        SamplingParams(temperature=1.3, top_k=40, top_p=0.9, min_p=0.01, presence_penalty=1.0, logit_bias={9: 3.0}),
        SamplingParams(temperature=0),
        SamplingParams(top_p=0.7, repetition_penalty=1.2),
    ] * (slots // 3)
    logits_BV = random_logits(2 * slots, vocab, seed=7)
    index_B = rng.integers(0, 5000, 2 * slots).astype(np.int32)
    seeds = rng.integers(0, 2**32, 2 * slots)

    def tokens(order: list[int], level: Needs) -> dict[int, int]:
        state = states([(plain + rich)[i] for i in order], vocab, seeds[order])
        tokens_B = sample_jit(logits_BV[order], state, index_B[order], level).tokens_W
        return dict(zip(order, np.asarray(tokens_B).tolist(), strict=True))

    together = tokens(list(range(2 * slots)), FULL)
    shuffled = tokens(rng.permutation(2 * slots).tolist(), FULL)
    assert together == shuffled
    assert tokens(list(range(slots)), RANDOM).items() <= together.items()
    for alone in (0, 1, slots, slots + 1, slots + 2):
        assert tokens([alone], FULL).items() <= together.items()
    assert tokens([slots + 1], GREEDY).items() <= together.items()


def test_what_a_slot_does_not_ask_for_leaves_its_logits_bit_for_bit():
    batch = [SamplingParams(), SamplingParams(top_k=3, min_p=0.5, frequency_penalty=1.0)] * (len(GRID) // 2)
    logits_BV = random_logits(len(GRID), 50, seed=8)
    everything = jnp.ones(len(GRID), jnp.bool_)
    state = count(states(batch, 50), indices(len(GRID), 4), everything)
    adjusted_BV = adjust_jit(logits_BV, state, indices(len(GRID)))
    kept_BV = np.asarray(truncate_jit(adjusted_BV, state))
    np.testing.assert_array_equal(kept_BV[::2].view(np.int32), logits_BV[::2].view(np.int32))
    assert (adjusted_BV != logits_BV).any(axis=1)[1::2].all()
    assert (kept_BV != adjusted_BV).any(axis=1)[1::2].all()


@pytest.mark.parametrize(("vocab", "level"), [(100, "full"), (12, "greedy")])
def test_logprobs_are_those_of_the_models_own_logits(vocab, level):
    batch = [SamplingParams(temperature=2.0, top_k=2, logit_bias={3: 9.0}), SamplingParams(temperature=0, logprobs=0)]
    logits_BV = random_logits(2, vocab, seed=9, ties=True)
    logits_BV[0, 5] = -np.inf
    sampled = sample_jit(logits_BV, states(batch, vocab), indices(2), Needs(level, 20))
    expected_BV = scipy.special.log_softmax(logits_BV.astype(np.float64), axis=1)
    order_BL = np.argsort(-expected_BV, axis=1, kind="stable")[:, :20]
    # Sums of up to 100 float32 terms, and a subtraction of numbers below 16.
    close = {"rtol": 0, "atol": 32 * np.finfo(np.float32).eps}
    chosen_B1 = np.asarray(sampled.tokens_W)[:, None]
    np.testing.assert_allclose(
        sampled.logprobs_W[:, None], np.take_along_axis(expected_BV, chosen_B1, axis=1), **close
    )
    np.testing.assert_array_equal(sampled.top_ids_WL, order_BL)
    np.testing.assert_allclose(sampled.top_logprobs_WL, np.take_along_axis(expected_BV, order_BL, axis=1), **close)


def test_logprobs_that_nobody_asked_for_are_absent():
    sampled = sample_jit(random_logits(3, 20, seed=10), empty(3, 20), indices(3), GREEDY)
    assert sampled.top_ids_WL.shape == sampled.top_logprobs_WL.shape == (3, 0)
    assert np.isnan(sampled.logprobs_W).all()


def test_the_sampler_runs_the_same_on_a_mesh_of_explicit_axes():
    vocab = 1400  # of which the likeliest are searched for in groups
    batch = [SamplingParams(top_p=0.9, presence_penalty=1.0, logprobs=5, min_tokens=2), SamplingParams(temperature=0)]
    logits_BV = random_logits(2, vocab, seed=12)
    prompts_BT = jnp.array([[1, 5, -1]] * 2, jnp.int32)

    def step(state: SamplingState, logits_BV: jax.Array, prompts_BT: jax.Array):
        rows = stacked([pack(params, EOS, slot) for slot, params in enumerate(batch)])
        state = install(state, jnp.arange(2), rows, prompts_BT, prompts_BT[:, -1:])
        sampled = sample(logits_BV, state, jnp.zeros(2, jnp.int32), needs(batch))
        return sampled, count(state, sampled.tokens_W, jnp.ones(2, jnp.bool_))

    expected = jax.jit(step)(empty(2, vocab), logits_BV, prompts_BT)
    mesh = jax.make_mesh((1, 8), ("pipe", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        arguments = jax.device_put((empty(2, vocab), logits_BV, prompts_BT), NamedSharding(mesh, P()))
        actual = jax.jit(step)(*arguments)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(actual))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)

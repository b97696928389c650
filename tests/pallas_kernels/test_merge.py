"""Attention over all keys is that over any parts of them, merged: what splits and an online softmax rest on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.blockwise import LOWEST, Options, _finish, _nothing_seen, _update
from pallas_kernels.flash_attention.mosaic_gpu import _merged
from pallas_kernels.flash_decoding.merge import _add_parts, with_sink
from pallas_kernels.parts import Part
from pallas_kernels.parts import merged as merge_parts
from tests.pallas_kernels.cases import ATOL, assert_close

KEYS, WIDTH, PARTS = 48, 8, 5
# Where the keys are cut into five parts, of which some may be empty, and how many of them are seen.
CUTS = st.lists(st.integers(0, KEYS), min_size=PARTS - 1, max_size=PARTS - 1).map(sorted)
SEEN, SEEDS, SPREAD = st.integers(0, KEYS), st.integers(0, 2**16), st.sampled_from([1.0, 30.0])

merged, merge_two = jax.jit(_merged, static_argnums=3), jax.jit(merge_parts)


def attention(scores: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.float64]:
    """Of one query in float64: its output and log-sum-exp, 0 and -inf where it sees nothing."""
    if not scores.size:
        return np.zeros(values.shape[1]), np.float64(-np.inf)
    lse = np.logaddexp.reduce(scores)
    return np.exp(scores - lse) @ values, lse


def drawn(cuts, seen: int, seed: int, spread: float):
    """The parts' outputs and log-sum-exps, the query's scores and values, and a sink's logit."""
    rng = np.random.default_rng(seed)
    scores, values = rng.normal(size=KEYS) * spread, rng.normal(size=(KEYS, WIDTH))
    borders = np.minimum([0, *cuts, KEYS], seen)
    parts = [attention(scores[a:b], values[a:b]) for a, b in itertools.pairwise(borders)]
    outs, lses = (np.array(x, np.float32) for x in zip(*parts, strict=True))
    return outs, lses, scores[:seen], values[:seen], np.float32(rng.normal() * spread)


def with_a_sink(scores: np.ndarray, values: np.ndarray, sink) -> tuple[np.ndarray, np.float64]:
    """One more term in the sum, without a value; where nothing is seen it stays so."""
    if not scores.size:
        return attention(scores, values)
    return attention(np.append(scores, sink), np.append(values, np.zeros((1, WIDTH)), axis=0))


@jax.jit
def joined(outs, lses, sink):
    """As a pipeline of the decode kernel joins a unit's parts, the first of which is where it begins."""
    state = outs[0], jnp.maximum(lses[0], LOWEST), jnp.float32(1)
    for group in (slice(1, 3), slice(3, PARTS)):
        state = _add_parts(state, list(zip(lses[group], outs[group], strict=True)))
    values, maximum, total = state
    lse = jnp.where(maximum > LOWEST, maximum + jnp.log(total), -jnp.inf)
    sunk, decay = with_sink(lse, sink)
    return (values / total, lse), (values / total * decay, sunk)


@settings(max_examples=100, deadline=None)
@given(CUTS, SEEN, SEEDS, SPREAD)
def test_parts_of_a_unit_of_decoding_join(cuts, seen, seed, spread):
    outs, lses, scores, values, sink = drawn(cuts, seen, seed, spread)
    plain, sunk = joined(outs, lses, sink)
    assert_close(plain, attention(scores, values), atol=spread * ATOL)
    assert_close(sunk, with_a_sink(scores, values, sink), atol=spread * ATOL)


@settings(max_examples=100, deadline=None)
@given(CUTS, SEEN, SEEDS, SPREAD)
def test_parts_of_the_keys_of_prefill_merge(cuts, seen, seed, spread):
    outs, lses, scores, values, sink = drawn(cuts, seen, seed, spread)
    parts = jnp.asarray(outs)[:, None, None], jnp.asarray(lses)[:, None, None]
    plain, sunk = (merged(*parts, sinks, jnp.float32) for sinks in (None, jnp.full(1, sink)))
    assert_close([x[0, 0] for x in plain], attention(scores, values), atol=spread * ATOL)
    assert_close([x[0, 0] for x in sunk], with_a_sink(scores, values, sink), atol=spread * ATOL)


@settings(max_examples=100, deadline=None)
@given(CUTS, SEEN, SEEDS, SPREAD)
def test_blocks_of_keys_of_cudnn_merge(cuts, seen, seed, spread):
    outs, lses, scores, values, _ = drawn(cuts, seen, seed, spread)
    whole = Part(outs[0][None, None, None], lses[0][None, None, None])
    for out, lse in zip(outs[1:], lses[1:], strict=True):
        whole = merge_two(whole, Part(out[None, None, None], lse[None, None, None]))
    assert_close([x[0, 0, 0] for x in whole], attention(scores, values), atol=spread * ATOL)


@jax.jit
def online(scores_C, values_CH, part_PC, sinks_N):
    """As the XLA path does it, part after part; the query is 1, so that the keys are the scores."""
    q_BQKgH = jnp.ones((1, 1, 1, 1, WIDTH))
    k_BKCH = jnp.broadcast_to(scores_C[:, None] / WIDTH, (KEYS, WIDTH))[None, None]
    softmax = _nothing_seen(q_BQKgH)
    for part_C in part_PC:
        softmax = _update(softmax, q_BQKgH, k_BKCH, values_CH[None, None], part_C[None, None], Options(1.0))
    return [_finish(softmax, sinks, jnp.float32) for sinks in (None, sinks_N)]


@settings(max_examples=100, deadline=None)
@given(CUTS, SEEN, SEEDS, SPREAD)
def test_an_online_softmax_is_that_of_all_keys_at_once(cuts, seen, seed, spread):
    rng = np.random.default_rng(seed)
    scores = (rng.normal(size=KEYS) * spread).astype(np.float32)
    values = rng.normal(size=(KEYS, WIDTH)).astype(np.float32)
    sink, borders = np.float32(rng.normal() * spread), np.minimum([0, *cuts, KEYS], seen)
    keys = np.arange(KEYS)
    part_PC = [(keys >= a) & (keys < b) for a, b in itertools.pairwise(borders)]
    values[seen:] = np.nan
    plain, sunk = online(scores, values, np.array(part_PC), np.full(1, sink))
    assert_close([x[0, 0, 0] for x in plain], attention(scores[:seen], values[:seen]), atol=spread * ATOL)
    assert_close([x[0, 0, 0] for x in sunk], with_a_sink(scores[:seen], values[:seen], sink), atol=spread * ATOL)

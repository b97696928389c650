"""Tree masks of flash_decoding: their words, what they mean, and their agreement with the float32 reference."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.flash_decoding import flash_decoding, pack_tree_mask
from pallas_kernels.flash_decoding.tree import unpack_tree_mask
from tests.pallas_kernels.cases import ATOL, Case, Inputs, assert_close, random_paths

B, Q, N, K, H, PAGE, COLUMNS = 3, 6, 4, 2, 16, 8, 6
CAUSAL = jnp.asarray(np.broadcast_to(np.tri(Q, dtype=bool), (B, Q, Q)))
DECODE = jax.jit(partial(flash_decoding, scale=H**-0.5, return_lse=True), static_argnames=("window", "implementation"))


@pytest.mark.parametrize("queries", [1, 31, 32, 33, 128])
def test_bits_are_packed_as_numpy_packs_them_and_come_back(queries):
    inputs = Inputs(Case((queries,), (queries,), tree=True, padding=0), seed=queries)
    seen_BQC = jnp.asarray(inputs.seen_BQC)
    np.testing.assert_array_equal(pack_tree_mask(seen_BQC), inputs.tree_mask)
    for dtype in (jnp.uint32, jnp.int32):
        np.testing.assert_array_equal(unpack_tree_mask(pack_tree_mask(seen_BQC).view(dtype)), seen_BQC)


def arguments(rng: np.random.Generator, lengths) -> tuple[jax.Array, ...]:
    """Random queries and pages, with NaN where a slot has no keys."""
    table_BJ = 1 + rng.permutation(B * COLUMNS).reshape(B, COLUMNS).astype(np.int32)
    pools = rng.normal(size=(2, 1 + B * COLUMNS, PAGE, K, H)).astype(np.float32)
    for row, length in zip(table_BJ, lengths, strict=True):
        keys = pools[:, row].reshape(2, -1, K, H)
        keys[:, length:] = np.nan
        pools[:, row] = keys.reshape(2, COLUMNS, PAGE, K, H)
    q_BQNH = rng.normal(size=(B, Q, N, H)).astype(np.float32)
    return tuple(map(jnp.asarray, (q_BQNH, *pools, table_BJ, np.array(lengths, np.int32))))


LENGTHS = st.lists(st.integers(0, PAGE * COLUMNS), min_size=B, max_size=B)
WINDOWS = st.sampled_from([None, 1, 4])


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), LENGTHS, WINDOWS)
def test_any_tree_is_that_of_the_reference(seed, lengths, window):
    rng = np.random.default_rng(seed)
    mask = pack_tree_mask(jnp.asarray(random_paths(rng, B, Q))).view(jnp.int32)
    given = arguments(rng, lengths)
    found, expected = (
        DECODE(*given, tree_mask_BQW=mask, window=window, implementation=name) for name in ("xla", "reference")
    )
    assert_close(found, expected)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), LENGTHS, WINDOWS, st.sampled_from(["xla", "reference"]))
def test_causal_bits_are_the_causal_mask(seed, lengths, window, implementation):
    """Bit for bit, whatever stands past the last query."""
    given = arguments(np.random.default_rng(seed), lengths)
    mask = pack_tree_mask(CAUSAL).view(jnp.int32) | jnp.int32(-1 << Q)
    with_bits, without = (
        DECODE(*given, tree_mask_BQW=bits, window=window, implementation=implementation) for bits in (mask, None)
    )
    for x, y in zip(with_bits, without, strict=True):
        np.testing.assert_array_equal(x, y)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(Q, 40), WINDOWS, st.sampled_from(["xla", "reference"]))
def test_a_node_is_a_token_behind_its_ancestors(seed, length, window, implementation):
    """The result of every node of a tree is that of one query at the end of a text of the node's path."""
    rng = np.random.default_rng(seed)
    parents = [int(rng.integers(-1, i)) for i in range(Q)]
    paths = [[0]]
    for i in range(1, Q):
        paths.append([*(paths[parents[i]] if parents[i] >= 0 else []), i])
    seen_QC = np.array([[key in path for key in range(Q)] for path in paths])
    q, *pools, table, lengths = arguments(rng, (length,) * B)
    mask = pack_tree_mask(jnp.asarray(np.broadcast_to(seen_QC, (B, Q, Q)))).view(jnp.int32)
    options = {"window": window, "implementation": implementation}
    out, lse = DECODE(q, *pools, table, lengths, tree_mask_BQW=mask, **options)

    for i, path in enumerate(paths):
        text = [*range(length - Q), *(length - Q + node for node in path)]
        laid_out = [np.full_like(pool, np.nan) for pool in pools]
        for row in np.asarray(table):
            for new, old in zip(laid_out, pools, strict=True):
                keys = np.asarray(old)[row].reshape(-1, K, H)[text]
                filled = np.full((COLUMNS * PAGE, K, H), np.nan, np.float32)
                filled[: len(text)] = keys
                new[row] = filled.reshape(COLUMNS, PAGE, K, H)
        shorter = jnp.full_like(lengths, len(text))
        alone = DECODE(q[:, i : i + 1], *map(jnp.asarray, laid_out), table, shorter, **options)
        assert_close((out[:, i : i + 1], lse[:, i : i + 1]), alone, atol=2 * ATOL)


def test_a_query_without_bits_sees_what_came_before_and_nothing_where_nothing_did():
    given = arguments(np.random.default_rng(0), (20, Q, 0))
    nothing = jnp.zeros((B, Q, 1), jnp.uint32)
    out, lse = DECODE(*given, tree_mask_BQW=nothing)
    assert np.isfinite(lse[0]).all()
    assert (np.asarray(lse[1:]) == -np.inf).all()
    assert (np.asarray(out[1:]) == 0).all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (jnp.zeros((B, Q), jnp.uint32), r"tree_mask.shape is \(3, 6\); allowed: \(3, 6, 1\)"),
        (jnp.zeros((B, Q, 2), jnp.uint32), r"tree_mask.shape is \(3, 6, 2\); allowed: \(3, 6, 1\)"),
        (jnp.zeros((1, Q, 1), jnp.uint32), r"tree_mask.shape is \(1, 6, 1\); allowed: \(3, 6, 1\)"),
        (jnp.zeros((B, Q, Q), jnp.bool_), "tree_mask.dtype is bool; allowed: uint32, int32"),
        (jnp.zeros((B, Q, 1), jnp.int16), "tree_mask.dtype is int16; allowed: uint32, int32"),
    ],
)
@pytest.mark.parametrize("implementation", ["auto", "mosaic_gpu"])
def test_a_mask_that_cannot_be_is_named(mask, message, implementation):
    given = arguments(np.random.default_rng(0), (9,) * B)
    with pytest.raises(ValueError, match=message):
        flash_decoding(*given, scale=1.0, tree_mask_BQW=mask, implementation=implementation)


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (jnp.ones((Q, Q), jnp.bool_), r"seen.shape is \(6, 6\); allowed: the axes BQQ"),
        (jnp.ones((B, Q, Q + 1), jnp.bool_), r"seen.shape is \(3, 6, 7\); allowed: the axes BQQ"),
        (jnp.ones((B, Q, Q), jnp.int32), "seen.dtype is int32; allowed: bool"),
        ([True], "seen is a list; allowed: an array"),
    ],
)
def test_what_cannot_be_packed_is_named(seen, message):
    with pytest.raises(ValueError, match=message):
        pack_tree_mask(seen)


def test_more_queries_than_a_mask_may_have():
    _, *given = arguments(np.random.default_rng(0), (9,) * B)
    q, mask = jnp.zeros((B, 129, N, H), jnp.float32), jnp.zeros((B, 129, 5), jnp.uint32)
    with pytest.raises(ValueError, match=r"tree_mask.shape is \(3, 129, 5\); allowed: at most 128 queries"):
        flash_decoding(q, *given, scale=1.0, tree_mask_BQW=mask)

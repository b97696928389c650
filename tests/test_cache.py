"""Pages in any order equal a contiguous cache, and nothing but a sequence's own tokens is ever read or written."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from jaxinfer.cache import CACHE_DTYPES, NULL_PAGE, Pages, View, attend_pages, make_cache, page_bytes
from jaxinfer.cache.quantized import LARGEST, SMALLEST_SCALE, numbers, quantize
from jaxinfer.cache.store import write
from jaxinfer.decode.batch import StepInput, make_batch, make_rectangle
from jaxinfer.decode.slots import empty_slots, taken
from jaxinfer.parallel import make_mesh
from pallas_kernels.blockwise import as_moved
from pallas_kernels.flash_decoding import pack_tree_mask

PAGE, NUM_PAGES, HEADS, KV_HEADS, SIZE = 4, 14, 4, 2, 8
TABLE_BJ = np.array([[9, 2, 11, 5], [4, 13, 1, 0]], np.int32)
LENGTHS = [13, 6]  # tokens of each sequence, the step's own included


quantized = jax.jit(quantize, static_argnums=1)


def positions_of(slot: int, count: int) -> np.ndarray:
    """Where the first tokens of a sequence lie in the flat pool."""
    at = np.arange(count)
    return TABLE_BJ[slot, at // PAGE] * PAGE + at % PAGE


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_a_cache_is_sharded_over_heads_and_counts_its_bytes(dtype):
    mesh = make_mesh(2)
    cache = make_cache(mesh, (0, 1, 0), (5, 9), PAGE, KV_HEADS, SIZE, dtype)
    assert [pages.k_PSKH.shape for pages in cache] == [(n, PAGE, KV_HEADS, SIZE) for n in (5, 9, 5)]
    for pages in cache:
        count = len(pages.k_PSKH)
        for array in (pages.k_PSKH, pages.v_PSKH):
            assert numbers(array).dtype == jnp.dtype(dtype)
            assert {shard.data.shape for shard in array.addressable_shards} == {(count, PAGE, 1, SIZE)}
        scales = [array for array in (pages.k_scales_PKS, pages.v_scales_PKS) if array is not None]
        assert len(scales) == (2 if dtype in LARGEST else 0)
        for array in scales:
            assert {shard.data.shape for shard in array.addressable_shards} == {(count, 1, PAGE)}
        held = sum(array.nbytes for array in jax.tree.leaves(pages))
        assert held == count * page_bytes(PAGE, KV_HEADS, SIZE, dtype)


def test_writing_touches_the_named_slots_alone():
    rng = np.random.default_rng(0)
    k_TKH, v_TKH = rng.standard_normal((2, 3, KV_HEADS, SIZE)).astype(np.float32)
    pool = jnp.full((NUM_PAGES, PAGE, KV_HEADS, SIZE), jnp.nan, jnp.float16)
    write_T = np.array([7, 55, 20], np.int32)
    pages = jax.jit(write)(Pages(pool, pool), write_T, k_TKH, v_TKH)
    for array, new_TKH in ((pages.k_PSKH, k_TKH), (pages.v_PSKH, v_TKH)):
        flat = np.asarray(array).reshape(-1, KV_HEADS, SIZE)
        np.testing.assert_array_equal(flat[write_T], new_TKH.astype(np.float16))
        assert np.isnan(np.delete(flat, write_T, axis=0)).all()


@pytest.mark.parametrize("dtype", LARGEST)
def test_writing_quantizes_the_named_slots_alone(dtype):
    """A scale goes to its page, head and slot."""
    rng = np.random.default_rng(0)
    k_TKH, v_TKH = rng.standard_normal((2, 3, KV_HEADS, SIZE)).astype(np.float32)
    rest = 7
    pool = as_moved(jnp.full((NUM_PAGES, PAGE, KV_HEADS, SIZE), rest, dtype))
    scales = jnp.full((NUM_PAGES, KV_HEADS, PAGE), jnp.nan, jnp.float32)
    write_T = np.array([7, 55, 20], np.int32)
    pages = jax.jit(write)(Pages(pool, pool, scales, scales), write_T, k_TKH, v_TKH)
    for array, found_PKS, new_TKH in (
        (pages.k_PSKH, pages.k_scales_PKS, k_TKH), (pages.v_PSKH, pages.v_scales_PKS, v_TKH)
    ):  # fmt: skip
        values_TKH, scales_TK = quantized(new_TKH, jnp.dtype(dtype))
        flat = np.asarray(numbers(array).astype(jnp.float32)).reshape(-1, KV_HEADS, SIZE)
        np.testing.assert_array_equal(flat[write_T], values_TKH.astype(jnp.float32))
        assert (np.delete(flat, write_T, axis=0) == rest).all()
        by_slot = np.asarray(found_PKS).swapaxes(1, 2).reshape(-1, KV_HEADS)
        np.testing.assert_array_equal(by_slot[write_T], scales_TK)
        assert np.isnan(np.delete(by_slot, write_T, axis=0)).all()


VECTORS = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=SIZE, max_size=SIZE)


@given(vector=VECTORS, dtype=st.sampled_from(list(LARGEST)))
def test_a_quantized_number_is_off_by_half_a_step_at_most(vector, dtype):
    """float8 has three bits after the first, down to steps of 2^-9; the division rounds once more."""
    x_H = np.array(vector, np.float32)
    values_TKH, scales_TK = quantized(x_H[None, None], jnp.dtype(dtype))
    values_H, scale = np.asarray(values_TKH, np.float64)[0, 0], float(np.asarray(scales_TK)[0, 0])
    assert scale >= SMALLEST_SCALE
    assert np.abs(values_H).max() <= LARGEST[dtype]
    exact_H = x_H.astype(np.float64) / scale
    half_steps = 0.5 if dtype == "int8" else np.maximum(np.abs(exact_H) / 16, 2.0**-10)
    assert (np.abs(values_H - exact_H) <= half_steps + 2.0**-23 * np.abs(exact_H)).all()


@pytest.mark.parametrize("dtype", LARGEST)
def test_zeros_stay_zeros_and_what_is_not_finite_is_not_hidden(dtype):
    x_TKH = np.array([[[0, 0]], [[1e-45, 0]], [[np.nan, 1]], [[np.inf, 1]]], np.float32)
    values_TKH, scales_TK = quantized(x_TKH, jnp.dtype(dtype))
    stored = np.asarray(values_TKH.astype(jnp.float32) * scales_TK[..., None])[:, 0]
    np.testing.assert_array_equal(stored[:2], 0)
    assert np.isnan(stored[2:]).any(axis=1).all()


def test_tokens_are_written_behind_what_their_sequence_has():
    """Decode and prefill alike; what ended and padding go to the null page, of which nothing is ever read."""
    slots = empty_slots(3, 1, 4, 16)
    table_BJ = jnp.asarray(np.vstack([TABLE_BJ, np.zeros((1, 4), np.int32)]))
    state = replace(
        slots,
        token_B=jnp.asarray([70, 71, 72], jnp.int32),
        length_B=jnp.asarray([12, 0, 0], jnp.int32),
        active_B=jnp.asarray([True, False, False]),
        tables=(table_BJ,),
    )
    given = StepInput(
        np.array([0, 0, 1, 2, 3, 4, 5, 0, 0, 0], np.int32),
        np.array([2, 0, 3], np.int32),  # of two that decode by the host's account, the first has ended
        np.array([2, 7, 7, 7], np.int32),
        np.array([1, 3, 3], np.int32),
        np.array([6, 0, 0], np.int32),  # the second chunk of five, of a prompt of six
        np.array([1, 0, 0], np.int32),
    )

    @partial(jax.jit, static_argnames=("tokens", "decode"))
    def laid_out(state, packed, **sizes):
        batch, rows = make_batch(state, StepInput.unpacked(packed, **sizes), PAGE)
        return batch, vars(rows)

    batch, rows = laid_out(state, given.packed(), **given.sizes)
    (view,) = batch.views
    written = [NULL_PAGE, positions_of(0, 13)[12], *positions_of(1, 6)[1:], *[NULL_PAGE] * 3]
    assert view.write_T.tolist() == written
    assert view.decode_lengths_B.tolist() == [0, 13, 0]
    assert view.prefill_starts_R1.tolist() == [0, 2, 7, 7, 7]
    assert view.prefill_lengths_R.tolist() == [0, 6, 0, 0]
    assert batch.tokens_T.tolist() == [0, 70, 1, 2, 3, 4, 5, 0, 0, 0]
    assert batch.positions_T.tolist() == [0, 12, 1, 2, 3, 4, 5, 0, 0, 0]
    assert rows["emits_W"].tolist() == [True, True, False]
    assert rows["tokens_W"].tolist()[:2] == [1, 6]
    assert rows["lengths_W"].tolist()[:2] == [13, 6]

    @jax.jit
    def rectangle(state, slots_B):
        batch, rows = make_rectangle(taken(state, slots_B), PAGE)
        return batch, vars(rows)

    batch, rows = rectangle(state, np.array([1, 0, 3, 3], np.int32))
    assert batch.views[0].write_T.tolist() == [NULL_PAGE, positions_of(0, 13)[12], NULL_PAGE, NULL_PAGE]
    assert batch.views[0].decode_lengths_B.tolist() == [0, 13, 0, 0]
    assert (batch.tokens_T.tolist(), batch.positions_T.tolist()) == ([0, 70, 0, 0], [0, 12, 0, 0])
    assert rows["emits_W"].tolist() == [False, True, False, False]


def contiguous(q_TNH, k_UKH, v_UKH, window: int | None) -> np.ndarray:
    """Causal attention of the last queries over all keys of one sequence, one query and head at a time, in float64."""
    out = np.zeros(q_TNH.shape)
    for t, n in np.ndindex(q_TNH.shape[:2]):
        position = len(k_UKH) - len(q_TNH) + t
        first = 0 if window is None else max(0, position + 1 - window)
        k_UH, v_UH = (x[first : position + 1, n // (HEADS // KV_HEADS)].astype(np.float64) for x in (k_UKH, v_UKH))
        out[t, n] = softmax(k_UH @ q_TNH[t, n] * SIZE**-0.5) @ v_UH
    return out


def as_stored(x_TKH: np.ndarray, dtype: str) -> np.ndarray:
    """What a cache of that dtype gives back."""
    if dtype not in LARGEST:
        return x_TKH
    values_TKH, scales_TK = quantized(x_TKH, jnp.dtype(dtype))
    return np.asarray(values_TKH, np.float32) * np.asarray(scales_TK)[..., None]


@pytest.mark.parametrize(
    ("dtype", "window", "slots"),
    [("float32", None, 1), ("float32", 5, 1), ("int8", 5, 1), ("float8_e4m3fn", None, 1), ("float32", 5, 6)],
)
def test_pages_equal_a_contiguous_cache(dtype, window, slots):
    """One token decoded beside four prefilled, on two devices; all that is not theirs is NaN.

    Quantized, the step's own tokens too are read as they were stored. Of the slots, which may be as many as the step
    has rows, the others are idle.
    """
    rng = np.random.default_rng(1)
    k, v = [[rng.standard_normal((n, KV_HEADS, SIZE)).astype(np.float32) for n in LENGTHS] for _ in range(2)]
    q = [rng.standard_normal((n, HEADS, SIZE)).astype(np.float32) for n in (1, 4)]

    def earlier() -> Pages:
        """What earlier steps wrote."""
        shape = NUM_PAGES, PAGE, KV_HEADS, SIZE
        pools = [as_moved(jnp.full(shape, 7 if dtype == "int8" else jnp.nan, dtype)) for _ in "kv"]
        if dtype in LARGEST:
            pools += [jnp.full((NUM_PAGES, KV_HEADS, PAGE), jnp.nan, jnp.float32) for _ in "kv"]
        old = [len(own) - len(new) for own, new in zip(k, q, strict=True)]
        at_T = jnp.asarray(np.concatenate([positions_of(slot, count) for slot, count in enumerate(old)]), jnp.int32)
        first = lambda sequences: np.concatenate([own[:count] for own, count in zip(sequences, old, strict=True)])  # noqa: E731
        return jax.jit(write)(Pages(*pools), at_T, first(k), first(v))

    def step(sequences) -> jax.Array:
        """This step's tokens, with one row of padding."""
        new = [sequence[-len(own) :] for sequence, own in zip(sequences, q, strict=True)]
        return jnp.asarray(np.concatenate([*new, np.full((1, *new[0].shape[1:]), np.nan, np.float32)]))

    integers = lambda *values: jnp.asarray(values, jnp.int32)  # noqa: E731
    view = View(
        write_T=integers(positions_of(0, 13)[12], *positions_of(1, 6)[2:], NULL_PAGE),
        decode_tables_BJ=jnp.asarray(np.tile(TABLE_BJ[:1], (slots, 1))),
        decode_lengths_B=integers(LENGTHS[0], *[0] * (slots - 1)),
        prefill_tables_RJ=jnp.asarray(TABLE_BJ),
        prefill_starts_R1=integers(0, 1, 5),
        prefill_lengths_R=integers(0, LENGTHS[1]),
    )
    heads, pages = jax.P(None, "tensor"), jax.P("context", None, "tensor")
    with jax.set_mesh(make_mesh(2)):
        queries = jax.device_put(step(q).reshape(-1, KV_HEADS, HEADS // KV_HEADS, SIZE), heads)
        k_TKH, v_TKH = jax.device_put((step(k), step(v)), heads)
        scales = jax.P("context", "tensor") if dtype in LARGEST else None
        state = jax.device_put(earlier(), Pages(pages, pages, scales, scales))
        attend = jax.jit(attend_pages, static_argnames=("scale", "window"))
        out, _ = attend(queries, k_TKH, v_TKH, state, view, scale=SIZE**-0.5, window=window)
    out_TNH = np.asarray(out).reshape(-1, HEADS, SIZE)
    stored = ([as_stored(own, dtype) for own in sequences] for sequences in (k, v))
    expected = [contiguous(*each, window) for each in zip(q, *stored, strict=True)]
    # Sums over at most 13 keys of values of size 3, in float32.
    np.testing.assert_allclose(out_TNH[:5], np.concatenate(expected), rtol=0, atol=1e-5)


def test_a_tree_goes_to_the_decode_kernel_on_every_device():
    """Two branches behind one token: each is decoded as if the other were not there."""
    rng = np.random.default_rng(2)
    length, queries = 13, 3
    k, v = rng.standard_normal((2, length, KV_HEADS, SIZE)).astype(np.float32)
    q = rng.standard_normal((queries, HEADS, SIZE)).astype(np.float32)
    flat = np.full((2, NUM_PAGES * PAGE, KV_HEADS, SIZE), np.nan, np.float32)
    flat[:, positions_of(0, length - queries)] = k[:-queries], v[:-queries]
    paths = [[0], [0, 1], [0, 2]]
    seen_BQC = np.array([[[key in path for key in range(queries)] for path in paths]])
    integers = lambda *values: jnp.asarray(values, jnp.int32)  # noqa: E731
    view = View(
        write_T=integers(*positions_of(0, length)[-queries:]),
        decode_tables_BJ=jnp.asarray(TABLE_BJ[:1]),
        decode_lengths_B=integers(length),
        prefill_tables_RJ=jnp.asarray(TABLE_BJ[:0]),
        prefill_starts_R1=integers(0),
        prefill_lengths_R=integers(),
        queries=queries,
        tree_mask_BQW=pack_tree_mask(jnp.asarray(seen_BQC)),
    )
    heads, pages = jax.P(None, "tensor"), jax.P("context", None, "tensor")
    with jax.set_mesh(make_mesh(2)):
        grouped = jax.device_put(jnp.asarray(q.reshape(queries, KV_HEADS, HEADS // KV_HEADS, SIZE)), heads)
        k_TKH, v_TKH = jax.device_put((jnp.asarray(k[-queries:]), jnp.asarray(v[-queries:])), heads)
        pools = (jnp.asarray(pool.reshape(NUM_PAGES, PAGE, KV_HEADS, SIZE)) for pool in flat)
        state = jax.device_put(Pages(*pools), pages)
        out, _ = jax.jit(attend_pages, static_argnames="scale")(grouped, k_TKH, v_TKH, state, view, scale=SIZE**-0.5)
    for i, path in enumerate(paths):
        text = [*range(length - queries), *(length - queries + node for node in path)]
        expected = contiguous(q[i : i + 1], k[text], v[text], None)
        np.testing.assert_allclose(np.asarray(out[i]).reshape(HEADS, SIZE), expected[0], rtol=0, atol=1e-5)

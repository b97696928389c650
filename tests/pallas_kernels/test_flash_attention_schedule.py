"""The work list of the prefill kernel: every row once, every visible key, and even shares."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.flash_attention import schedule
from pallas_kernels.flash_attention.schedule import ROW_ALIGNMENT, Blocks, Tile

ROWS, BLOCK_KV, TOKENS = 32, 16, 290


@partial(jax.jit, static_argnums=2)
def build(cu_q, lengths, window):
    tiles, count = schedule.schedule(cu_q, lengths, TOKENS, rows=ROWS, block_kv=BLOCK_KV, window=window)
    return tiles, jnp.stack(schedule.key_blocks(Tile(*tiles.T), ROWS, BLOCK_KV, window), axis=1), count


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=4, max_size=4),
    st.sampled_from([None, 1, 17, 50]),
)
def test_every_row_is_in_one_tile_and_every_visible_key_in_its_blocks(sequences, window):
    queries, context = np.array(sequences).T
    cu_q, lengths = np.cumsum([0, *queries], dtype=np.int32), np.maximum(queries + context - 20, 0).astype(np.int32)
    tiles, blocks, (count,) = map(np.asarray, build(cu_q, lengths, window))
    positions = np.full(TOKENS, -1)
    for r, length in enumerate(lengths):
        positions[cu_q[r] : cu_q[r + 1]] = length - queries[r] + np.arange(queries[r])
    assert len(tiles) >= count
    covered, work = np.zeros(TOKENS, int), []
    for tile, keys in zip(tiles[:count], blocks[:count], strict=True):
        tile, keys = Tile(*tile), Blocks(*keys)
        assert tile.row % ROW_ALIGNMENT == 0
        work.append(keys.total)
        rows = slice(max(tile.row, tile.start), min(tile.row + ROWS, tile.end))
        covered[rows] += 1
        position, key = positions[rows, None], np.arange(BLOCK_KV * (keys.high + 2))
        assert (position[:, 0] == np.arange(rows.start, rows.stop) + tile.shift).all() or (position == -1).all()
        seen = key <= position
        if window is not None:
            seen &= key > position - window
        by_block = seen.reshape(len(seen), -1, BLOCK_KV)
        used, clean = np.flatnonzero(by_block.any((0, 2))), np.flatnonzero(by_block.all((0, 2)))
        assert list(used) == list(range(keys.low, keys.high))
        assert list(clean) == list(range(keys.clean_low, keys.clean_high))
    assert (covered == 1).all()
    assert work == sorted(work, reverse=True)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 60), st.integers(0, 8))
def test_shares_are_complete_and_even(blocks, items, seed):
    work = np.sort(np.random.default_rng(seed).integers(1, 50, items))[::-1]
    rounds = jnp.arange(60, dtype=jnp.int32)  # as many whatever is drawn, so that little is compiled
    taken = []
    for i in map(jnp.int32, range(blocks)):
        share = schedule.share(i, blocks, jnp.int32(items))
        taken.append(np.asarray(schedule.item(i, blocks, rounds))[: int(share)])
    assert sorted(itertools.chain(*taken)) == list(range(items))
    sums = [work[mine].sum() for mine in taken]
    assert max(sums) - min(sums) <= work[0]

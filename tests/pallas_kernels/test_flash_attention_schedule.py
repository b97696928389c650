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


@partial(jax.jit, static_argnums=(2, 3))
def build(cu_q, lengths, window, splits=1):
    tiles, count = schedule.schedule(cu_q, lengths, TOKENS, rows=ROWS, block_kv=BLOCK_KV, window=window, splits=splits)
    return tiles, jnp.stack(schedule.key_blocks(Tile(*tiles.T), ROWS, BLOCK_KV, window, splits), axis=1), count


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=4, max_size=4),
    st.sampled_from([None, 1, 50]),
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
@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 200)), min_size=4, max_size=4),
    st.sampled_from([(None, 5), (50, 2)]),
)
def test_parts_of_the_keys_of_a_tile_are_its_blocks_evenly(sequences, kind):
    (window, splits), (queries, context) = kind, np.array(sequences).T
    cu_q, lengths = np.cumsum([0, *queries], dtype=np.int32), (queries + context).astype(np.int32)
    (tiles, blocks, (count,)), parts = (list(map(np.asarray, build(cu_q, lengths, window, n))) for n in (1, splits))
    split_tiles, split_blocks, (split_count,) = parts
    assert split_count == splits * count

    def by_tile(tiles, blocks, count):
        found = {}
        for tile, keys in zip(tiles[:count].tolist(), blocks[:count], strict=True):
            found.setdefault(tuple(tile[:-1]), {})[tile[-1]] = Blocks(*keys)
        return found

    whole, split = by_tile(tiles, blocks, count), by_tile(split_tiles, split_blocks, split_count)
    assert whole.keys() == split.keys()
    for tile, of_part in split.items():
        keys = whole[tile][0]
        assert sorted(of_part) == list(range(splits))
        for kind in ((0, 3), (1, 2)):  # all blocks, and those that every row sees
            ranges = [range(of_part[part][kind[0]], of_part[part][kind[1]]) for part in range(splits)]
            assert list(itertools.chain(*ranges)) == list(range(keys[kind[0]], keys[kind[1]]))
        sizes = [part.total for part in of_part.values()]
        assert max(sizes) - min(sizes) <= 1
    work = [Blocks(*keys).total for keys in split_blocks[:split_count]]
    assert work == sorted(work, reverse=True)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 8))
def test_items_are_all_tiles_of_all_heads_and_those_of_a_kv_head_come_together(tiles, kv_heads, group):
    items = jnp.arange(60 * 5 * 8, dtype=jnp.int32)  # as many in every example, for which nothing compiles anew
    placed = schedule.rank_and_head(items, jnp.int32(tiles), jnp.int32(group))
    ranks, heads = (np.asarray(x)[: tiles * kv_heads * group] for x in placed)
    expected = itertools.product(range(kv_heads), range(tiles), range(group))
    assert [(head // group, rank, head % group) for rank, head in zip(ranks, heads, strict=True)] == list(expected)


def test_few_tiles_with_keys_come_before_those_without():
    """200 queries behind 1,000 keys, in 512 rows: five tiles of 128, three of them padding, of eight heads, four of
    which share a KV head, on 24 multiprocessors."""
    cu_q, lengths = jnp.array([0, 200], jnp.int32), jnp.array([1200], jnp.int32)
    tiles, (count,) = schedule.schedule(cu_q, lengths, 512, rows=128, block_kv=128, window=None)
    work = schedule.key_blocks(Tile(*tiles.T), 128, 128, None, 1).total
    at_once = schedule.heads_at_once(count, 8, 2, 24)
    ranks, _ = schedule.rank_and_head(jnp.arange(8 * count, dtype=jnp.int32), count, at_once)
    items = np.asarray(work)[ranks].tolist()
    assert items == sorted(items, reverse=True)


def test_heads_of_a_kv_head_come_at_a_time_where_their_tiles_keep_all_blocks_busy():
    at_once = partial(schedule.heads_at_once, query_heads=32, kv_heads=8, blocks=132)
    assert [int(at_once(jnp.int32(tiles))) for tiles in (1, 32, 33, 256)] == [32, 32, 4, 4]


def test_sorting_tiles_takes_memory_for_tiles_and_not_for_pairs_of_them():
    def temporary_bytes(tokens: int) -> int:
        run = partial(schedule.schedule, tokens=tokens, rows=128, block_kv=128, window=None)
        cu_q, lengths = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (2, 1))
        return jax.jit(run).lower(cu_q, lengths).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(65_536) <= 4.1 * temporary_bytes(16_384)

"""Which query rows are worked on and in which order: ragged sequences cut into tiles, the longest first."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blockwise import ceil_div

ROW_ALIGNMENT = 8  # TMA copies rows in groups of 8, the height of the tiles that wgmma reads


class Tile(NamedTuple):
    """Some rows of q from `row` on, of which those in [start, end) belong to the sequence.

    `row` is a multiple of 8, so that the first tile of a sequence can begin before it. The query in row i has
    position i + shift. Where the keys of a tile are split, each of its parts is an entry of its own.
    """

    row: jax.Array
    start: jax.Array
    end: jax.Array
    shift: jax.Array
    sequence: jax.Array
    part: jax.Array


class Keys(NamedTuple):
    """The keys [begin, end) that any query of a sequence sees."""

    begin: jax.Array
    end: jax.Array


class Blocks(NamedTuple):
    """The blocks of keys [low, high) that a tile sees; every row sees all of [clean_low, clean_high)."""

    low: jax.Array
    clean_low: jax.Array
    clean_high: jax.Array
    high: jax.Array

    @property
    def total(self) -> jax.Array:
        return self.high - self.low

    def nth(self, i: jax.Array | int) -> jax.Array:
        """Counted from the last block on."""
        return self.high - 1 - i

    def part(self, number: jax.Array, splits: int) -> Blocks:
        """The blocks of one of `splits` parts, as even as can be."""
        low, high = (self.low + lax.div(self.total * i, jnp.full_like(i, splits)) for i in (number, number + 1))
        return Blocks(*(jnp.clip(border, low, high) for border in self))


def keys_in_sight(tile: Tile, window: int | None) -> Keys:
    end = tile.end + tile.shift
    if window is None:
        return Keys(jnp.zeros_like(end), end)
    return Keys(jnp.maximum(tile.start + tile.shift - window + 1, 0), end)


def key_blocks(tile: Tile, rows: int, block_kv: int, window: int | None, splits: int) -> Blocks:
    first = jnp.maximum(tile.row, tile.start) + tile.shift
    last = jnp.minimum(tile.row + rows, tile.end) - 1 + tile.shift

    def whole_blocks(keys):
        return lax.div(jnp.maximum(keys, 0), jnp.full_like(keys, block_kv))

    high = whole_blocks(last + block_kv)
    low = clean_low = jnp.zeros_like(high)
    if window is not None:
        low = jnp.minimum(whole_blocks(first - window + 1), high)
        clean_low = whole_blocks(last - window + block_kv)
    clean_high = jnp.clip(whole_blocks(first + 1), low, high)
    whole = Blocks(low, jnp.clip(clean_low, low, clean_high), clean_high, high)
    return whole if splits == 1 else whole.part(tile.part, splits)


def schedule(
    cu_q_R1: jax.Array, lengths_R: jax.Array, tokens: int, *, rows: int, block_kv: int, window: int | None,
    splits: int = 1,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The tiles of `rows` rows as int32 rows of `Tile`, most blocks of keys first, and how many there are.

    Each tile is listed once for each of the `splits` parts of its keys, of which some may be empty. The rows past the
    last sequence are one more sequence, without keys. All of it depends on lengths only: XLA computes it once for the
    layers of a model.
    """
    border_R1 = jnp.append(cu_q_R1, jnp.int32(tokens))
    start_R, end_R = border_R1[:-1], border_R1[1:]
    shift_R = jnp.append(lengths_R, jnp.int32(0)) - end_R
    aligned_R = start_R - start_R % ROW_ALIGNMENT
    tiles_R = jnp.where(end_R > start_R, ceil_div(end_R - aligned_R, rows), 0)
    end_tile_R = jnp.cumsum(tiles_R)
    # A sequence of n rows needs at most (n + 7 - 1) // rows + 1 tiles, and an empty one none.
    sequences = min(len(start_R), tokens)
    most_tiles = (tokens + (ROW_ALIGNMENT - 2) * sequences) // rows + sequences

    entry_I = jnp.arange(most_tiles * splits, dtype=jnp.int32)
    tile_I, part_I = entry_I // splits, entry_I % splits
    sequence_I = jnp.sum(tile_I[:, None] >= end_tile_R[None], axis=1, dtype=jnp.int32)
    sequence_I = jnp.minimum(sequence_I, len(start_R) - 1)
    row_I = aligned_R[sequence_I] + (tile_I - (end_tile_R - tiles_R)[sequence_I]) * rows
    tiles = Tile(row_I, start_R[sequence_I], end_R[sequence_I], shift_R[sequence_I], sequence_I, part_I)
    work_I = jnp.where(tile_I < end_tile_R[-1], key_blocks(tiles, rows, block_kv, window, splits).total, -1)
    # The padding has no row in the page table, and reads no page.
    tiles = tiles._replace(sequence=jnp.minimum(sequence_I, len(lengths_R) - 1))
    return _in_falling_order(jnp.stack(tiles, axis=1), work_I), end_tile_R[-1:] * splits


def _in_falling_order(x_I6: jax.Array, key_I: jax.Array) -> jax.Array:
    """Stable. Counting who comes first is one kernel for the GPU, where a sort is many."""
    i_I = jnp.arange(len(key_I), dtype=jnp.int32)
    first_II = (key_I[None] > key_I[:, None]) | ((key_I[None] == key_I[:, None]) & (i_I[None] < i_I[:, None]))
    return jnp.zeros_like(x_I6).at[jnp.sum(first_II, axis=1, dtype=jnp.int32)].set(x_I6, unique_indices=True)


def heads_at_once(tiles: jax.Array, query_heads: int, kv_heads: int, blocks: int) -> jax.Array:
    """Whose tiles are worked on at a time: those of the heads that share a KV head, which then stays in the L2.

    If these are too few for the `blocks` that work on them, all: else tiles without keys come between those with.
    """
    group = query_heads // kv_heads
    return jnp.where(tiles * group < blocks, query_heads, group)


def rank_and_head(item: jax.Array, tiles: jax.Array, at_once: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which entry of the work list, and which head, an item is: all tiles of the first `at_once` heads come first,
    then those of the next."""
    section = lax.div(item, tiles * at_once)
    within = item - section * tiles * at_once
    return lax.div(within, jnp.int32(at_once)), section * at_once + lax.rem(within, jnp.int32(at_once))

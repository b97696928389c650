"""`flash_attention` in plain XLA: memory linear in the tokens, and constant in the length of their context.

The queries of every sequence are cut into tiles, so that each tile has one row of the page table. A few
tiles at a time go over their keys block by block (blockwise.py).
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise import Attend, Options, PagedKV, attend, ceil_div
from pallas_kernels.stripe import Stripe


# Jitted, so that the layers of a model share one trace.
@partial(jax.jit, static_argnames=("options", "attend", "tile_queries", "tiles_at_once", "block_keys"))
def flash_attention(
    q_TNH: jax.Array,
    kv: PagedKV,
    table_RJ: jax.Array,
    cu_q_R1: jax.Array,
    lengths_R: jax.Array,
    sinks_N: jax.Array | None,
    options: Options,
    kv_lengths_R: jax.Array | None = None,
    stripe: Stripe | None = None,
    *,
    attend: Attend = attend,
    tile_queries: int = 128,
    tiles_at_once: int = 16,
    block_keys: int = 1024,
) -> tuple[jax.Array, jax.Array]:
    """See the public op.

    The scores of one step take tiles_at_once * tile_queries * N * block_keys floats, 268 MB at 32 heads.
    Smaller steps would leave a GPU waiting for the loop, which costs tens of microseconds an iteration.
    """
    T = len(q_TNH)
    tile_queries = min(tile_queries, T)
    # Every sequence has at least one query in its last tile, so there are never more tiles than this.
    sequences = min(len(lengths_R), T)
    most_tiles = (T - sequences) // tile_queries + sequences
    tiles_at_once = min(tiles_at_once, most_tiles)
    end_tile_R = jnp.cumsum(ceil_div(jnp.diff(cu_q_R1), tile_queries))

    def attend_group(i: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tile_B = i * tiles_at_once + jnp.arange(tiles_at_once, dtype=jnp.int32)
        row_BQ, position_BQ, sequence_B = _cut(tile_B, end_tile_R, cu_q_R1, lengths_R, tile_queries, T)
        q_BQNH = q_TNH.at[row_BQ].get(mode="fill", fill_value=0)
        end_B = None if kv_lengths_R is None else kv_lengths_R[sequence_B]
        some = {} if end_B is None and stripe is None else {"end_B": end_B, "stripe": stripe}
        tiles = attend(q_BQNH, position_BQ, kv, table_RJ[sequence_B], sinks_N, options, block_keys=block_keys, **some)
        return jax.tree.map(lambda x, tile: x.at[row_BQ].set(tile, mode="drop", unique_indices=True), results, tiles)

    # Results are written over what q is made into, and not over constants: those wait for nothing, and XLA makes the
    # ones of all layers at the start of a step, 2 GB of them for 8,192 tokens of an 8B model.
    begun = q_TNH, q_TNH[..., 0].astype(jnp.float32)
    if tiles_at_once == most_tiles:  # a loop of one would still cost its own start
        out_TNH, lse_TN = attend_group(jnp.int32(0), begun)
    else:
        out_TNH, lse_TN = jax.lax.fori_loop(0, ceil_div(end_tile_R[-1], tiles_at_once), attend_group, begun)
    return _without_padding(out_TNH, lse_TN, cu_q_R1[-1])


def _without_padding(out_TNH: jax.Array, lse_TN: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows from `end` on have seen nothing."""
    padding_T11 = (jnp.arange(len(out_TNH), dtype=jnp.int32) >= end)[:, None, None]
    return jnp.where(padding_T11, 0, out_TNH), jnp.where(padding_T11[..., 0], -jnp.inf, lse_TN)


def _cut(
    tile_B: jax.Array,
    end_tile_R: jax.Array,
    cu_q_R1: jax.Array,
    lengths_R: jax.Array,
    tile_queries: int,
    tokens: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The rows of q in each tile, their positions, and the tile's sequence.

    Rows past the end of a sequence, and all rows of tiles past the last, get distinct numbers past the last
    token, and position -1, which sees nothing.
    """
    sequence_B = jnp.sum(tile_B[:, None] >= end_tile_R[None], axis=1, dtype=jnp.int32)
    sequence_B = jnp.minimum(sequence_B, len(lengths_R) - 1)
    start_B, end_B = cu_q_R1[sequence_B], cu_q_R1[sequence_B + 1]
    tiles_B = ceil_div(end_B - start_B, tile_queries)
    nth_B = tile_B - (end_tile_R[sequence_B] - tiles_B)
    row_BQ = (start_B + nth_B * tile_queries)[:, None] + jnp.arange(tile_queries, dtype=jnp.int32)[None]
    inside_BQ = row_BQ < end_B[:, None]
    position_BQ = jnp.where(inside_BQ, (lengths_R[sequence_B] - end_B)[:, None] + row_BQ, -1)
    padding_BQ = tokens + jnp.arange(row_BQ.size, dtype=jnp.int32).reshape(row_BQ.shape)
    return jnp.where(inside_BQ, row_BQ, padding_BQ), position_BQ, sequence_B

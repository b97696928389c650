"""The units of work of a decode kernel: the query rows of a slot that share a KV head, in blocks of at most 64."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise import PagedKV, ceil_div
from pallas_kernels.flash_decoding.config import ROWS
from pallas_kernels.flash_decoding.quantized import OPERAND, in_key_order, query_unit


@dataclass(frozen=True)
class Shape:
    """The sizes of a problem.

    Attributes:
        slots, queries, heads, kv_heads, head_size: as in q_BQNH and the pages.
        page_size, columns: slots of a page, and pages in a row of the table.
        dtype: of q and of the result.
        kv_dtype: of the pages.
    """

    slots: int
    queries: int
    heads: int
    kv_heads: int
    head_size: int
    page_size: int
    columns: int
    dtype: jnp.dtype
    kv_dtype: jnp.dtype

    @staticmethod
    def of(q_BQNH: jax.Array, kv: PagedKV, table_BJ: jax.Array) -> "Shape":
        B, Q, N, H = q_BQNH.shape
        kv_heads, kv_dtype = kv.k_PSKH.shape[2], kv.k_PSKH.dtype
        return Shape(B, Q, N, kv_heads, H, kv.page_size, table_BJ.shape[1], q_BQNH.dtype, kv_dtype)

    @property
    def quantized(self) -> bool:
        return self.kv_dtype != self.dtype

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def blocks(self) -> int:
        """Blocks of rows that a slot and a KV head have."""
        return ceil_div(self.queries * self.group, ROWS)

    @property
    def rows(self) -> int:
        """Rows of a block; those of the last one may be padding."""
        return ceil_div(self.queries * self.group, self.blocks)

    @property
    def padded_rows(self) -> int:
        """Rows of a block of queries in memory: a copy into a swizzled tile is of whole groups of 8."""
        return ceil_div(self.rows, 8) * 8

    @property
    def stored_rows(self) -> int:
        """Rows of a block of results in memory: on 256 columns and a number of rows that 4 does not divide, Mosaic
        GPU's inference of layouts does not come to an end (JAX 0.11.2 and 0.12.0)."""
        return ceil_div(self.rows, 4) * 4 if self.head_size > 128 else self.rows

    @property
    def units(self) -> int:
        """Units of a slot."""
        return self.kv_heads * self.blocks


def to_units(q_BQNH: jax.Array, shape: Shape) -> jax.Array:
    """The queries by unit, [units of all slots, padded rows, H]; for quantized keys as those are multiplied."""
    if shape.quantized:
        q_BQNH = in_key_order((q_BQNH * (1 / query_unit(shape.dtype))).astype(OPERAND))
    B, Q, K, g, H = shape.slots, shape.queries, shape.kv_heads, shape.group, shape.head_size
    q_BKRH = q_BQNH.reshape(B, Q, K, g, H).transpose(0, 2, 1, 3, 4).reshape(B, K, Q * g, H)
    padding = shape.blocks * shape.rows - Q * g
    q_URH = jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, padding), (0, 0))).reshape(-1, shape.rows, H)
    return jnp.pad(q_URH, ((0, 0), (0, shape.padded_rows - shape.rows), (0, 0)))


def from_units(x_URH: jax.Array, shape: Shape) -> jax.Array:
    """Results by unit, [units of all slots, at least `rows`, H], as [B, Q, N, H]."""
    B, Q, K, g, H = shape.slots, shape.queries, shape.kv_heads, shape.group, x_URH.shape[-1]
    x_BKRH = x_URH[:, : shape.rows].reshape(B, K, shape.blocks * shape.rows, H)[:, :, : Q * g]
    return x_BKRH.reshape(B, K, Q, g, H).transpose(0, 2, 1, 3, 4).reshape(B, Q, K * g, H)


def rows_of_queries(x_BQi: jax.Array, shape: Shape) -> jax.Array:
    """What belongs to each query, by block and row: [slots x blocks, ROWS, i]; 0 in rows of padding."""
    x_BRi = jnp.repeat(x_BQi, shape.group, axis=1)
    padding = shape.blocks * shape.rows - x_BRi.shape[1]
    x_bRi = jnp.pad(x_BRi, ((0, 0), (0, padding), (0, 0))).reshape(-1, shape.rows, x_BQi.shape[2])
    return jnp.pad(x_bRi, ((0, 0), (0, ROWS - shape.rows), (0, 0)))


def sinks_of_rows(sinks_N: jax.Array, shape: Shape) -> jax.Array:
    """The sink of every row of a slot's units, float32 [units of a slot, ROWS]."""
    sinks_KQg = jnp.broadcast_to(
        sinks_N.astype(jnp.float32).reshape(shape.kv_heads, 1, shape.group),
        (shape.kv_heads, shape.queries, shape.group),
    )
    rows_KR = sinks_KQg.reshape(shape.kv_heads, -1)
    padding = shape.blocks * shape.rows - rows_KR.shape[1]
    rows_UR = jnp.pad(rows_KR, ((0, 0), (0, padding))).reshape(shape.units, shape.rows)
    return jnp.pad(rows_UR, ((0, 0), (0, ROWS - shape.rows)))

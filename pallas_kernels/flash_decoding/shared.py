"""What the warpgroups of the decode kernel share: arrays, shared memory, and the part of a unit that is at hand."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_decoding.config import ROWS, TILE_KEYS, Config
from pallas_kernels.flash_decoding.merge import padded
from pallas_kernels.flash_decoding.quantized import OPERAND, WARPS, value_rows
from pallas_kernels.flash_decoding.units import Shape

PART_COLUMNS = 32  # of a part that are stored at a time, for want of memory


class Inputs(NamedTuple):
    """In device memory; the pages as [slots of all pages, KV heads x H], so that a copy names rows and columns.

    `tree` is a `TreeRows`, or None where the mask is causal.
    """

    q: Any
    k: Any
    v: Any
    table: Any
    lengths: Any
    work: Any
    merge: Any
    tickets: Any
    sinks: Any
    k_scales: Any
    v_scales: Any
    tree: Any


class Outputs(NamedTuple):
    """Results of whole units, and normalized parts of the others, each with its log-sum-exp."""

    out: Any
    lse: Any
    part: Any
    part_lse: Any


class Scratch(NamedTuple):
    """In shared memory, that of one pipeline beside that of the other: rings of buffers, their barriers, and room for
    what is stored: units, and parts or the rows that they are joined to.

    Also the softmax's `weights` where they are an operand in memory, the tile's as `operands` for the interpreter, and
    where the warps of a consumer meet (`quantized.over_keys`).
    """

    q: Any
    k: Any
    v: Any
    k_scales: Any
    v_scales: Any
    weights: Any
    operands: Any
    meeting: Any
    out: Any
    part: Any
    statistics: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    q_free: Any
    tile_free: Any


@dataclass(frozen=True)
class Part:
    """The tiles of one unit that lie in a stretch; traced scalars.

    Attributes:
        pipeline: of the CTA, whose stretch it is.
        slot, unit: which unit; `unit` counts within the slot.
        length: keys of the slot.
        tile, count: the first tile, counted from the slot's first key, and how many.
        whole: whether these are all tiles of the unit.
        done, nth: tiles and units of the stretch that came before.
    """

    pipeline: Any
    slot: Any
    unit: Any
    length: Any
    tile: Any
    count: Any
    whole: Any
    done: Any
    nth: Any

    def stage(self, i, config: Config) -> Any:
        """The buffer of the nth of these tiles."""
        return self.pipeline * config.stages + lax.rem(self.done + i, config.stages)

    def q_buffer(self, config: Config) -> Any:
        return self.pipeline * config.q_buffers + lax.rem(self.nth, config.q_buffers)

    def queries(self, shape: Shape, config: Config, rows: int) -> Any:
        """Where the first `rows` rows of the queries' buffer are."""
        first = lax.rem(self.nth, config.q_buffers) * _q_stride(shape, config)
        return pl.ds(pl.multiple_of(self.pipeline * _q_rows(shape, config) + first, 8), rows)


def stretch_of(pipeline, config: Config) -> Any:
    """The number of a pipeline's stretch."""
    return lax.axis_index("cta") * config.pipelines + pipeline


def _q_stride(shape: Shape, config: Config) -> int:
    """Rows from a buffer of queries to the next. What a product takes beyond the queries is never looked at, and may
    be those of the next buffer; the interpreter would see a race."""
    return product_rows(shape) if config.interpretable else shape.padded_rows


def _q_rows(shape: Shape, config: Config) -> int:
    """Rows of a pipeline's buffers of queries."""
    return product_rows(shape) + (config.q_buffers - 1) * _q_stride(shape, config)


def product_rows(shape: Shape) -> int:
    """Query rows that a product takes: 64 at least where they are its first operand."""
    return shape.padded_rows if shape.quantized else ROWS


def scratch_memory(shape: Shape, config: Config) -> Scratch:
    H, pipelines = shape.head_size, config.pipelines
    stages, q_buffers = pipelines * config.stages, pipelines * config.q_buffers
    copies = max(1, TILE_KEYS // shape.page_size)
    scales = plgpu.SMEM((stages, TILE_KEYS), jnp.float32) if shape.quantized else None
    weights = operands = meeting = None
    rows, dtype, part_columns = product_rows(shape), shape.dtype, PART_COLUMNS
    if shape.quantized:
        dtype, part_columns = OPERAND, H
        weights = _matrix((pipelines, rows, TILE_KEYS), dtype)
        meeting = plgpu.SMEM((pipelines, WARPS, rows), jnp.float32)
        if config.interpretable:
            sizes = ((TILE_KEYS, H), (value_rows(H), TILE_KEYS))
            operands = tuple(_matrix((pipelines, *size), dtype) for size in sizes)
    elif config.interpretable:
        weights = _matrix((pipelines, rows, TILE_KEYS), dtype)
    padded_bytes = padded(H) * shape.dtype.itemsize
    arrivals = 2 * copies if shape.quantized else copies
    return Scratch(
        q=_matrix((pipelines * _q_rows(shape, config), H), dtype),
        k=_matrix((stages, TILE_KEYS, H), shape.kv_dtype),
        v=_matrix((stages, TILE_KEYS, H), shape.kv_dtype),
        k_scales=scales,
        v_scales=scales,
        weights=weights,
        operands=operands,
        meeting=meeting,
        out=plgpu.SMEM((pipelines, ROWS, H), shape.dtype),
        # Both of the same size, or what one pipeline writes would lie over what the other has.
        part=plgpu.RefUnion(
            plgpu.SMEM((pipelines, ROWS, part_columns), jnp.float32),
            plgpu.SMEM((pipelines, ROWS * part_columns * 4 // padded_bytes, padded(H)), shape.dtype),
        ),
        statistics=plgpu.SMEM((pipelines, 2, ROWS), jnp.float32),
        q_ready=plgpu.Barrier(num_barriers=q_buffers),
        k_ready=plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        v_ready=plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        q_free=plgpu.Barrier(num_barriers=q_buffers),
        tile_free=plgpu.Barrier(num_barriers=stages),
    )


def _matrix(shape: tuple[int, ...], dtype: jnp.dtype) -> Any:
    """Memory in tiles of 8 rows, as wgmma reads them, swizzled against bank conflicts over their whole width.

    The width is what 128 bytes hold, or of the widths 64 and 32 the largest that divides a row.
    """
    columns = next(n for n in (128, 64, 32) if shape[-1] % n == 0 and n * dtype.itemsize <= 128)
    tiles = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(columns * dtype.itemsize)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiles, swizzle))

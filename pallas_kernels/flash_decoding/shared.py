"""What the warpgroups of the decode kernel share: arrays, shared memory, and the part of a unit that is at hand."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_decoding.config import ROWS, TILE_KEYS, Config
from pallas_kernels.flash_decoding.merge import rows_scratch
from pallas_kernels.flash_decoding.quantized import OPERAND, WARPS, value_rows
from pallas_kernels.flash_decoding.units import Shape


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
    """In shared memory: rings of buffers, their barriers, and room for what is stored.

    Of each consumer: the softmax's `weights` where they are an operand in memory, the tile's as `operands` for the
    interpreter, and where its warps meet (`quantized.over_keys`).
    """

    q: Any
    k: Any
    v: Any
    k_scales: Any
    v_scales: Any
    weights: Any
    operands: Any
    meeting: Any
    results: Any
    statistics: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    q_free: Any
    tile_free: Any
    room: Any
    handed_over: Any


@dataclass(frozen=True)
class Part:
    """The tiles of one unit that lie in a CTA's stretch; traced scalars.

    Attributes:
        slot, unit: which unit; `unit` counts within the slot.
        length: keys of the slot.
        tile, count: the first tile, counted from the slot's first key, and how many.
        whole: whether these are all tiles of the unit.
        done, nth: tiles and units of the stretch that came before.
    """

    slot: Any
    unit: Any
    length: Any
    tile: Any
    count: Any
    whole: Any
    done: Any
    nth: Any


def scratch_memory(shape: Shape, config: Config) -> Scratch:
    H, stages, consumers = shape.head_size, config.stages, config.consumers
    copies = max(1, TILE_KEYS // shape.page_size)
    scales = plgpu.SMEM((stages, TILE_KEYS), jnp.float32) if shape.quantized else None
    weights = operands = meeting = None
    if shape.quantized:
        rows, dtype = shape.padded_rows, OPERAND
        weights = _matrix((consumers, rows, TILE_KEYS), dtype)
        meeting = plgpu.SMEM((consumers, WARPS, rows), jnp.float32)
        if config.interpretable:
            sizes = ((TILE_KEYS, H), (value_rows(H), TILE_KEYS))
            operands = tuple(_matrix((consumers, *size), dtype) for size in sizes)
    else:
        rows, dtype = ROWS, shape.dtype
        if config.interpretable:
            weights = _matrix((consumers, rows, TILE_KEYS), dtype)
    arrivals = 2 * copies if shape.quantized else copies
    return Scratch(
        q=_matrix((config.q_buffers, rows, H), dtype),
        k=_matrix((stages, TILE_KEYS, H), shape.kv_dtype),
        v=_matrix((stages, TILE_KEYS, H), shape.kv_dtype),
        k_scales=scales,
        v_scales=scales,
        weights=weights,
        operands=operands,
        meeting=meeting,
        results=plgpu.RefUnion(
            plgpu.SMEM((ROWS, H), shape.dtype),
            plgpu.SMEM((ROWS, H), jnp.float32),
            rows_scratch(shape.stored_rows, H, shape.dtype),
        ),
        statistics=plgpu.SMEM((2, ROWS), jnp.float32),
        q_ready=plgpu.Barrier(num_barriers=config.q_buffers),
        k_ready=plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        v_ready=plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        q_free=plgpu.Barrier(num_arrivals=consumers, num_barriers=config.q_buffers),
        tile_free=plgpu.Barrier(num_barriers=stages),
        room=plgpu.Barrier(),
        handed_over=plgpu.Barrier(),
    )


def _matrix(shape: tuple[int, ...], dtype: jnp.dtype) -> Any:
    """Memory in tiles of 8 rows, as wgmma reads them, swizzled against bank conflicts over their whole width.

    The width is what 128 bytes hold, or of the widths 64 and 32 the largest that divides a row.
    """
    columns = next(n for n in (128, 64, 32) if shape[-1] % n == 0 and n * dtype.itemsize <= 128)
    tiles = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(columns * dtype.itemsize)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiles, swizzle))

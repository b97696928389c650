"""The warpgroup of the decode kernel that loads: it copies queries and tiles as buffers become free."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise import Options
from pallas_kernels.flash_decoding.config import TILE_KEYS, Config
from pallas_kernels.flash_decoding.shared import Inputs, Part, Scratch
from pallas_kernels.flash_decoding.units import Shape


def load(inputs: Inputs, scratch: Scratch, part: Part, *, shape: Shape, options: Options, config: Config) -> None:
    """Issues the copies of a unit's queries and of its tiles, as buffers become free."""
    _load_queries(inputs, scratch, part, shape, config)
    head = part.unit // shape.blocks

    def step(i, pages):
        tile = part.tile + i
        stage = part.stage(i, config)
        following = _pages(inputs, part.slot, tile + 1, shape)  # asked for before it is needed

        @pl.when(part.done + i >= config.stages)
        def _():
            plgpu.barrier_wait(scratch.tile_free.at[stage])

        for of in ("k", "v"):
            for piece, page in enumerate(pages):
                _copy_piece(inputs, scratch, of, stage, part, tile, piece, page, head, shape, options)
        return following

    lax.fori_loop(0, part.count, step, _pages(inputs, part.slot, part.tile, shape))


def _load_queries(inputs: Inputs, scratch: Scratch, part: Part, shape: Shape, config: Config) -> None:
    buffer = part.q_buffer(config)

    @pl.when(part.nth >= config.q_buffers)
    def _():
        plgpu.barrier_wait(scratch.q_free.at[buffer])

    rows = shape.padded_rows
    first = pl.multiple_of((part.slot * shape.units + part.unit) * rows, 8)
    target = scratch.q.at[part.queries(shape, config, rows)]
    plgpu.copy_gmem_to_smem(inputs.q.at[pl.ds(first, rows)], target, scratch.q_ready.at[buffer])


def _pages(inputs: Inputs, slot, tile, shape: Shape) -> tuple[jax.Array, ...]:
    """The pages that a tile lies in; past the end of the table the last one stands in."""
    size = min(shape.page_size, TILE_KEYS)
    firsts = [tile * TILE_KEYS + piece * size for piece in range(TILE_KEYS // size)]
    return tuple(inputs.table[slot, jnp.minimum(key // shape.page_size, shape.columns - 1)] for key in firsts)


def _copy_piece(
    inputs: Inputs, scratch: Scratch, of: str, stage, part: Part, tile, piece: int, page, head, shape: Shape,
    options: Options,
) -> None:  # fmt: skip
    """Copies the part of a tile of keys ("k") or values ("v") that lies in one page, if any of its keys is seen."""
    size = min(shape.page_size, TILE_KEYS)
    ready = getattr(scratch, f"{of}_ready").at[stage]
    target = pl.ds(piece * size, size)
    key = tile * TILE_KEYS + piece * size
    slot = lax.rem(key, shape.page_size)
    seen = key < part.length
    if options.window is not None:
        seen &= key + size > part.length - shape.queries - options.window + 1

    @pl.when(seen)
    def _():
        rows = pl.ds(pl.multiple_of(page * shape.page_size + slot, size), size)
        columns = pl.ds(pl.multiple_of(head * shape.head_size, shape.head_size), shape.head_size)
        ring = getattr(scratch, of).at[stage, target]
        plgpu.copy_gmem_to_smem(getattr(inputs, of).at[rows, columns], ring, ready)
        if shape.quantized:
            first = pl.multiple_of((page * shape.kv_heads + head) * shape.page_size + slot, size)
            scales = getattr(inputs, f"{of}_scales").at[pl.ds(first, size)]
            # In bounds, it is a copy of bytes in a row, which need no more than 16 of them for alignment.
            in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            ring = getattr(scratch, f"{of}_scales").at[stage, target]
            plgpu.copy_gmem_to_smem(scales, ring, ready, oob_mode=in_bounds)

    @pl.when(jnp.logical_not(seen))
    def _():
        for _ in range(2 if shape.quantized else 1):
            plgpu.barrier_arrive(ready)


def drain(free, used, pipeline, buffers: int) -> None:
    """Waits until the last uses of a pipeline's buffers are over, so that every phase of their barriers was seen."""

    @pl.loop(jnp.maximum(used - buffers, 0), used)
    def _(nth):
        plgpu.barrier_wait(free.at[pipeline * buffers + lax.rem(nth, buffers)])

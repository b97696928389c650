"""What the warpgroups of the decode kernel share: arrays, shared memory, and the part of a unit that is at hand."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_decoding.config import ROWS, TILE_KEYS, Config
from pallas_kernels.flash_decoding.merge import rows_scratch
from pallas_kernels.flash_decoding.units import Shape

# How wgmma reads its operands from shared memory.
OPERAND = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]


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
    tree: Any


class Outputs(NamedTuple):
    """Results of whole units, and normalized parts of the others, each with its log-sum-exp."""

    out: Any
    lse: Any
    part: Any
    part_lse: Any


class Scratch(NamedTuple):
    """In shared memory: rings of buffers, their barriers, and room for what is stored."""

    q: Any
    k: Any
    v: Any
    weights: Any
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
    H, stages = shape.head_size, config.stages
    matrix = partial(plgpu.SMEM, dtype=shape.dtype, transforms=OPERAND)
    copies = max(1, TILE_KEYS // shape.page_size)
    return Scratch(
        q=matrix((config.q_buffers, ROWS, H)),
        k=matrix((stages, TILE_KEYS, H)),
        v=matrix((stages, TILE_KEYS, H)),
        weights=matrix((config.consumers, ROWS, TILE_KEYS)) if config.interpretable else None,
        results=plgpu.RefUnion(
            plgpu.SMEM((ROWS, H), shape.dtype), plgpu.SMEM((ROWS, H), jnp.float32), rows_scratch(H, shape.dtype)
        ),
        statistics=plgpu.SMEM((2, ROWS), jnp.float32),
        q_ready=plgpu.Barrier(num_barriers=config.q_buffers),
        k_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        v_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        q_free=plgpu.Barrier(num_arrivals=config.consumers, num_barriers=config.q_buffers),
        tile_free=plgpu.Barrier(num_barriers=stages),
        room=plgpu.Barrier(),
        handed_over=plgpu.Barrier(),
    )

"""`flash_decoding` on Hopper: the pages stream through shared memory, each once for up to 64 query rows.

A CTA has two pipelines. In each, one warpgroup issues the copies (TMA) of a stretch of keys and values, tile after
tile, into a ring of buffers in shared memory, and another multiplies; while one pipeline ends a unit, the other goes
on. The query rows of a unit, all heads that share a KV head and all queries of the slot, are the rows of one matrix
product, so that the heads of a group share one read of the keys. More than 64 rows are several units, each of which
reads all of the keys. schedule.py says who reads what, and merge.py what becomes of units that several of them read.

There a pipeline waits for what those of other CTAs leave, so all CTAs must be on the GPU together: they are no more
than multiprocessors, and no two launches that wait may run beside each other. XLA's one stream of computations keeps
that, and in programs that are compiled to run kernels side by side, that each such launch depends on the one before.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.blockwise import Options, PagedKV
from pallas_kernels.checks import require
from pallas_kernels.flash_decoding.choice import choose
from pallas_kernels.flash_decoding.config import ROWS, Config
from pallas_kernels.flash_decoding.consumer import clear_empty, compute, join_own
from pallas_kernels.flash_decoding.merge import merge, padded
from pallas_kernels.flash_decoding.producer import drain, load
from pallas_kernels.flash_decoding.schedule import Schedule, make_schedule, tiles_in_sight
from pallas_kernels.flash_decoding.shared import Inputs, Outputs, Part, scratch_memory, stretch_of
from pallas_kernels.flash_decoding.tree import tree_rows
from pallas_kernels.flash_decoding.units import Shape, from_units, sinks_of_rows, to_units
from pallas_kernels.lowered import once

# Of a thread: those of two pipelines share 65,536.
LOADER_REGISTERS, CONSUMER_REGISTERS = 40, 216


def flash_decoding(
    q_BQNH: jax.Array,
    kv: PagedKV,
    table_BJ: jax.Array,
    lengths_B: jax.Array,
    sinks_N: jax.Array | None,
    options: Options,
    tree_mask_BQW: jax.Array | None = None,
    schedule: Schedule | None = None,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See the public op; the schedule is made here where the caller has none."""
    shape = Shape.of(q_BQNH, kv, table_BJ)
    config = config or choose(shape, dispatch.multiprocessors())
    schedule = schedule or plan(lengths_B, shape, options.window, config)
    made_for, needed = len(schedule.work_C5), config.stretches
    require(made_for == needed, "schedule", f"one for {made_for} stretches", f"one for the {needed} of this GPU")
    return _launch(
        q_BQNH, kv, table_BJ, lengths_B, sinks_N, tree_mask_BQW, schedule,
        shape=shape, options=options, config=config,
    )  # fmt: skip


def plan(lengths_B: jax.Array, shape: Shape, window: int | None, config: Config | None = None) -> Schedule:
    """The schedule of a problem; `config` is chosen unless given."""
    config = config or choose(shape, dispatch.multiprocessors())
    return make_schedule(
        lengths_B, queries=shape.queries, window=window, units=shape.units, stretches=config.stretches
    )


# Jitted, so that the layers of a model share one trace.
@partial(jax.jit, static_argnames=("shape", "options", "config"))
def _launch(
    q_BQNH, kv, table_BJ, lengths_B, sinks_N, tree_mask_BQW, schedule, *,
    shape: Shape, options: Options, config: Config,
):  # fmt: skip
    H, units = shape.head_size, shape.slots * shape.units
    k, v = (pages.reshape(-1, shape.kv_heads * H) for pages in (kv.k_PSKH, kv.v_PSKH))
    k_scales, v_scales = (x if x is None else x.reshape(-1) for x in (kv.k_scales_PKS, kv.v_scales_PKS))
    sinks = None if sinks_N is None else sinks_of_rows(sinks_N, shape)
    tree = None if tree_mask_BQW is None else tree_rows(tree_mask_BQW, lengths_B, shape, options.window)
    inputs = Inputs(
        to_units(q_BQNH, shape).reshape(-1, H),
        k,
        v,
        table_BJ,
        lengths_B,
        schedule.work_C5,
        schedule.merge_C4,
        schedule.tickets_C1,
        sinks,
        k_scales,
        v_scales,
        tree,
    )
    outputs = Outputs(
        out=jax.ShapeDtypeStruct((units, shape.stored_rows, H), shape.dtype),
        lse=jax.ShapeDtypeStruct((units, ROWS), jnp.float32),
        part=jax.ShapeDtypeStruct((2 * config.stretches, shape.stored_rows, padded(H)), jnp.float32),
        part_lse=jax.ShapeDtypeStruct((2 * config.stretches, ROWS), jnp.float32),
    )
    run = plgpu.kernel(
        partial(_kernel, shape=shape, options=options, config=config),
        out_type=outputs,
        scratch_types=(scratch_memory(shape, config),),
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=2 * config.pipelines,
        thread_name="role",
        kernel_name="flash_decoding",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=128),
    )
    results = Outputs(*once(run, ("flash_decoding", shape, options, config), inputs))
    out, lse = merge(results, schedule.merge_C4, sinks) if config.interpretable else results[:2]
    return from_units(out, shape), from_units(lse[..., None], shape)[..., 0]


def _kernel(inputs: Inputs, *refs, shape: Shape, options: Options, config: Config):
    *outputs, scratch = refs
    outputs = Outputs(*outputs)
    role = lax.axis_index("role")
    pipeline = lax.rem(role, config.pipelines)
    stretch = stretch_of(pipeline, config)
    walk = partial(_for_each_part, inputs, pipeline, stretch, shape, options)

    @pl.when(role < config.pipelines)
    def _():
        _set_registers(LOADER_REGISTERS, "decrease", config)
        tiles, units = walk(partial(load, inputs, scratch, shape=shape, options=options, config=config))
        drain(scratch.tile_free, tiles, pipeline, config.stages)
        drain(scratch.q_free, units, pipeline, config.q_buffers)

    @pl.when(role >= config.pipelines)
    def _():
        _set_registers(CONSUMER_REGISTERS, "increase", config)
        clear_empty(inputs, outputs, scratch, pipeline, stretch, shape=shape, config=config)
        walk(partial(compute, inputs, outputs, scratch, shape=shape, options=options, config=config))
        if not config.interpretable:
            join_own(inputs, outputs, stretch, scratch.part[1].at[pipeline])
        plgpu.wait_smem_to_gmem(0)


def _set_registers(count: int, action: Any, config: Config) -> None:
    """The loaders need few; with four warpgroups a quarter each would not do for the others."""
    if config.pipelines > 1 and not config.interpretable:
        plgpu.set_max_registers(count, action=action)


def _for_each_part(
    inputs: Inputs, pipeline, stretch, shape: Shape, options: Options, visit: Callable[[Part], None]
) -> tuple[Any, Any]:
    """Walks over a stretch, unit by unit; returns its numbers of tiles and units."""

    def step(state):
        slot, unit, tile, left, done, nth = state
        length = inputs.lengths[slot]
        first, tiles = tiles_in_sight(length, shape.queries, options.window)
        count = jnp.minimum(tiles - tile, left)
        part = Part(pipeline, slot, unit, length, first + tile, count, count == tiles, done, nth)
        pl.when(tiles > 0)(lambda: visit(part))
        last_unit = (unit == shape.units - 1) | (tiles == 0)
        next_slot = jnp.minimum(slot + last_unit.astype(jnp.int32), shape.slots - 1)
        next_unit = jnp.where(last_unit, 0, unit + 1)
        return next_slot, next_unit, jnp.int32(0), left - count, done + count, nth + (tiles > 0).astype(jnp.int32)

    start = tuple(inputs.work[stretch, i] for i in range(4))
    *_, tiles, units = lax.while_loop(lambda state: state[3] > 0, step, (*start, jnp.int32(0), jnp.int32(0)))
    return tiles, units

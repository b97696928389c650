"""`flash_decoding` on Hopper: the pages stream through shared memory, and every byte of them is read once.

One warpgroup of a CTA issues the copies (TMA) of its stretch of keys and values, tile after tile, into a ring of
buffers in shared memory; the others multiply, a tile each in turn, and put their results together at the end of a
unit. The query rows of a unit, all heads that share a KV head and all queries of the slot, are the rows of one matrix
product, so that the heads of a group share one read of the keys. schedule.py says who reads what, and merge.py what
becomes of units that several CTAs read.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.blockwise import LOWEST, Options, PagedKV
from pallas_kernels.flash_decoding import config as configs
from pallas_kernels.flash_decoding.config import ROWS, TILE_KEYS, Config, choose
from pallas_kernels.flash_decoding.merge import join, merge, padded, rows_scratch, signal, wait_for, with_sink
from pallas_kernels.flash_decoding.schedule import (
    Schedule,
    make_schedule,
    partial_index,
    tiles_in_sight,
)
from pallas_kernels.flash_decoding.units import Shape, from_units, sinks_of_rows, to_units

LOG2_E = math.log2(math.e)
SCORES = plgpu.Layout.WGMMA
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
# How wgmma reads its operands from shared memory.
OPERAND = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
LOADER_REGISTERS, CONSUMER_REGISTERS = 40, 232


class Inputs(NamedTuple):
    """In device memory; the pages as [slots of all pages, KV heads x H], so that a copy names rows and columns."""

    q: Any
    k: Any
    v: Any
    table: Any
    lengths: Any
    work: Any
    merge: Any
    tickets: Any
    sinks: Any


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


def flash_decoding(
    q_BQNH: jax.Array,
    kv: PagedKV,
    table_BJ: jax.Array,
    lengths_B: jax.Array,
    sinks_N: jax.Array | None,
    options: Options,
    schedule: Schedule | None = None,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See the public op; the schedule is made here where the caller has none."""
    shape = Shape.of(q_BQNH, kv, table_BJ)
    config = config or choose(shape.head_size, dispatch.multiprocessors())
    if schedule is None:
        schedule = make_schedule(
            lengths_B, queries=shape.queries, window=options.window, units=shape.units, ctas=config.ctas
        )
    return _launch(q_BQNH, kv, table_BJ, lengths_B, sinks_N, schedule, shape=shape, options=options, config=config)


def unsupported(q_BQNH: jax.Array, kv: PagedKV) -> str | None:
    """Why the kernel cannot take an input that the public op allows; None if it can."""
    return configs.unsupported(q_BQNH.dtype.name, kv.k_PSKH.dtype.name, q_BQNH.shape[-1], kv.page_size)


# Jitted, so that the layers of a model share one trace.
@partial(jax.jit, static_argnames=("shape", "options", "config"))
def _launch(q_BQNH, kv, table_BJ, lengths_B, sinks_N, schedule, *, shape: Shape, options: Options, config: Config):
    H, units = shape.head_size, shape.slots * shape.units
    k, v = (pages.reshape(-1, shape.kv_heads * H) for pages in (kv.k_PSKH, kv.v_PSKH))
    sinks = None if sinks_N is None else sinks_of_rows(sinks_N, shape)
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
    )
    outputs = Outputs(
        out=jax.ShapeDtypeStruct((units, shape.stored_rows, H), shape.dtype),
        lse=jax.ShapeDtypeStruct((units, ROWS), jnp.float32),
        part=jax.ShapeDtypeStruct((2 * config.ctas, shape.stored_rows, padded(H)), jnp.float32),
        part_lse=jax.ShapeDtypeStruct((2 * config.ctas, ROWS), jnp.float32),
    )
    run = plgpu.kernel(
        partial(_kernel, shape=shape, options=options, config=config),
        out_type=outputs,
        scratch_types=(_scratch(shape, config),),
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=1 + config.consumers,
        thread_name="role",
        kernel_name="flash_decoding",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=128),
    )
    results = Outputs(*run(inputs))
    out, lse = merge(results, schedule.merge_C4, sinks) if config.interpretable else results[:2]
    return from_units(out, shape), from_units(lse[..., None], shape)[..., 0]


def _scratch(shape: Shape, config: Config) -> Scratch:
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


def _kernel(inputs: Inputs, *refs, shape: Shape, options: Options, config: Config):
    *outputs, scratch = refs
    outputs = Outputs(*outputs)
    role = lax.axis_index("role")
    walk = partial(_for_each_part, inputs, shape, options)

    @pl.when(role == 0)
    def _():
        _set_registers(LOADER_REGISTERS, "decrease", config)
        tiles, units = walk(partial(_load, inputs, scratch, shape=shape, options=options, config=config))
        _drain(scratch.tile_free, tiles, config.stages)
        _drain(scratch.q_free, units, config.q_buffers)

    @pl.when(role > 0)
    def _():
        _set_registers(CONSUMER_REGISTERS, "increase", config)
        walk(partial(_compute, inputs, outputs, scratch, shape=shape, options=options, config=config))

    @pl.when(role == 1)
    def _():
        if not config.interpretable:
            _join_own(inputs, outputs, scratch.results[2])
        plgpu.wait_smem_to_gmem(0)


def _set_registers(count: int, action: Any, config: Config) -> None:
    """The loader needs few; with three warpgroups a third each would not do for the others."""
    if config.consumers > 1 and not config.interpretable:
        plgpu.set_max_registers(count, action=action)


def _for_each_part(inputs: Inputs, shape: Shape, options: Options, visit: Callable[[Part], None]) -> tuple[Any, Any]:
    """Walks over the stretch of this CTA, unit by unit; returns its numbers of tiles and units."""
    cta = lax.axis_index("cta")

    def step(state):
        slot, unit, tile, left, done, nth = state
        length = inputs.lengths[slot]
        first, tiles = tiles_in_sight(length, shape.queries, options.window)
        count = jnp.minimum(tiles - tile, left)
        visit(Part(slot, unit, length, first + tile, count, count == tiles, done, nth))
        last_unit = unit == shape.units - 1
        next_slot = jnp.minimum(slot + last_unit.astype(jnp.int32), shape.slots - 1)
        next_unit = jnp.where(last_unit, 0, unit + 1)
        return next_slot, next_unit, jnp.int32(0), left - count, done + count, nth + 1

    start = tuple(inputs.work[cta, i] for i in range(4))
    *_, tiles, units = lax.while_loop(lambda state: state[3] > 0, step, (*start, jnp.int32(0), jnp.int32(0)))
    return tiles, units


# --- the warpgroup that loads


def _load(inputs: Inputs, scratch: Scratch, part: Part, *, shape: Shape, options: Options, config: Config) -> None:
    """Issues the copies of a unit's queries and of its tiles, as buffers become free."""
    _load_queries(inputs, scratch, part, shape, config)
    head = part.unit // shape.blocks
    columns = pl.ds(pl.multiple_of(head * shape.head_size, shape.head_size), shape.head_size)

    def step(i, pages):
        tile, nth = part.tile + i, part.done + i
        stage = lax.rem(nth, config.stages)
        following = _pages(inputs, part.slot, tile + 1, shape)  # asked for before it is needed

        @pl.when(nth >= config.stages)
        def _():
            plgpu.barrier_wait(scratch.tile_free.at[stage])

        for pool, ring, ready in ((inputs.k, scratch.k, scratch.k_ready), (inputs.v, scratch.v, scratch.v_ready)):
            for piece, page in enumerate(pages):
                _copy_piece(pool, ring.at[stage], ready.at[stage], part, tile, piece, page, columns, shape, options)
        return following

    lax.fori_loop(0, part.count, step, _pages(inputs, part.slot, part.tile, shape))


def _load_queries(inputs: Inputs, scratch: Scratch, part: Part, shape: Shape, config: Config) -> None:
    buffer = lax.rem(part.nth, config.q_buffers)

    @pl.when(part.nth >= config.q_buffers)
    def _():
        plgpu.barrier_wait(scratch.q_free.at[buffer])

    rows = shape.padded_rows
    first = pl.multiple_of((part.slot * shape.units + part.unit) * rows, 8)
    plgpu.copy_gmem_to_smem(
        inputs.q.at[pl.ds(first, rows)], scratch.q.at[buffer, pl.ds(0, rows)], scratch.q_ready.at[buffer]
    )


def _pages(inputs: Inputs, slot, tile, shape: Shape) -> tuple[jax.Array, ...]:
    """The pages that a tile lies in; past the end of the table the last one stands in."""
    size = min(shape.page_size, TILE_KEYS)
    firsts = [tile * TILE_KEYS + piece * size for piece in range(TILE_KEYS // size)]
    return tuple(inputs.table[slot, jnp.minimum(key // shape.page_size, shape.columns - 1)] for key in firsts)


def _copy_piece(pool, buffer, ready, part: Part, tile, piece: int, page, columns, shape: Shape, options: Options):
    """Copies the part of a tile that lies in one page, if any of its keys is seen."""
    size = min(shape.page_size, TILE_KEYS)
    key = tile * TILE_KEYS + piece * size
    seen = key < part.length
    if options.window is not None:
        seen &= key + size > part.length - shape.queries - options.window + 1

    @pl.when(seen)
    def _():
        row = pl.multiple_of(page * shape.page_size + lax.rem(key, shape.page_size), size)
        plgpu.copy_gmem_to_smem(pool.at[pl.ds(row, size), columns], buffer.at[pl.ds(piece * size, size)], ready)

    @pl.when(jnp.logical_not(seen))
    def _():
        plgpu.barrier_arrive(ready)


def _drain(free, used, buffers: int) -> None:
    """Waits until the last uses of all buffers are over, so that every phase of their barriers was seen."""

    @pl.loop(jnp.maximum(used - buffers, 0), used)
    def _(nth):
        plgpu.barrier_wait(free.at[lax.rem(nth, buffers)])


# --- the warpgroups that compute


def _compute(
    inputs: Inputs, outputs: Outputs, scratch: Scratch, part: Part, *, shape: Shape, options: Options, config: Config
) -> None:
    """Attention of a unit's rows to the tiles of this part, online (FlashAttention-2, Dao 2023, algorithm 1)."""
    consumer = lax.axis_index("role") - 1
    buffer = lax.rem(part.nth, config.q_buffers)
    position = _positions(part, shape)
    plgpu.barrier_wait(scratch.q_ready.at[buffer])
    tile = partial(_tile, scratch, part, position, buffer, shape=shape, options=options, config=config)
    zeros = plgpu.layout_cast(jnp.zeros((ROWS, shape.head_size), jnp.float32), SCORES)
    row = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), BY_ROW)
    # Tiles go around among the consumers; which one is first depends on the tiles that came before.
    first = lax.rem(consumer + config.consumers - lax.rem(part.done, config.consumers), config.consumers)
    turns = (part.count - first + config.consumers - 1) // config.consumers
    own = lambda turn, carry: tile(first + turn * config.consumers, carry)  # noqa: E731
    softmax = lax.fori_loop(0, turns, own, (zeros, row + LOWEST, row))
    plgpu.barrier_arrive(scratch.q_free.at[buffer])
    store = partial(_store, inputs, outputs, scratch, part, shape=shape, config=config)
    if config.consumers == 1:
        store(softmax)
    else:
        pl.when(consumer == 1)(lambda: _hand_over(scratch, softmax))
        pl.when(consumer == 0)(lambda: store(_taken_over(scratch, softmax)))


def _hand_over(scratch: Scratch, softmax) -> None:
    values_smem = scratch.results[1]
    plgpu.barrier_wait(scratch.room)
    values_smem[...], scratch.statistics[0], scratch.statistics[1] = softmax
    plgpu.commit_smem()
    plgpu.barrier_arrive(scratch.handed_over)


def _taken_over(scratch: Scratch, softmax):
    """One softmax of what two consumers saw."""
    values, maximum, total = softmax
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # results of the unit before
    plgpu.barrier_arrive(scratch.room)
    plgpu.barrier_wait(scratch.handed_over)
    others = plgpu.load(scratch.results[1], layout=SCORES)
    others_maximum = plgpu.load(scratch.statistics.at[0], layout=BY_ROW)
    others_total = plgpu.load(scratch.statistics.at[1], layout=BY_ROW)
    plgpu.commit_smem()  # all have read before anyone writes
    joint = jnp.maximum(maximum, others_maximum)
    own, other = jnp.exp2(maximum - joint), jnp.exp2(others_maximum - joint)
    values = values * lax.broadcast_in_dim(own, values.shape, [0])
    values = values + others * lax.broadcast_in_dim(other, values.shape, [0])
    return values, joint, total * own + others_total * other


def _positions(part: Part, shape: Shape) -> jax.Array:
    """The position of every row's query."""
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=BY_ROW)
    block = lax.rem(part.unit, shape.blocks)
    return part.length - shape.queries + (block * shape.rows + row) // shape.group


def _tile(
    scratch: Scratch, part: Part, position, buffer, i, carry, *, shape: Shape, options: Options, config: Config
):  # fmt: skip
    values, maximum, total = carry
    first_key = (part.tile + i) * TILE_KEYS
    stage = lax.rem(part.done + i, config.stages)
    plgpu.barrier_wait(scratch.k_ready.at[stage])
    scores = _product(scratch.q.at[buffer], scratch.k.at[stage].T, TILE_KEYS)
    scores = _masked(_scaled(scores, options), first_key, position, options)
    new_maximum = jnp.maximum(maximum, scores.max(axis=1))
    decay = jnp.exp2(maximum - new_maximum)
    weights = jnp.exp2(scores - lax.broadcast_in_dim(new_maximum, scores.shape, [0]))
    total = total * decay + weights.sum(axis=1)
    values = values * lax.broadcast_in_dim(decay, values.shape, [0])
    plgpu.barrier_wait(scratch.v_ready.at[stage])
    _clear_unseen(scratch.v.at[stage], first_key, part, shape, options)
    values = _add_product(values, weights.astype(shape.dtype), scratch, scratch.v.at[stage], config)
    plgpu.barrier_arrive(scratch.tile_free.at[stage])
    return values, new_maximum, total


def _product(a, b, columns: int) -> jax.Array:
    def multiply(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, columns), jnp.float32))


def _scaled(scores: jax.Array, options: Options) -> jax.Array:
    """In base 2, so that an exponential is one instruction."""
    if options.soft_cap is None:
        return scores * (options.scale * LOG2_E)
    return jnp.tanh(scores * (options.scale / options.soft_cap)) * (options.soft_cap * LOG2_E)


def _masked(scores: jax.Array, first_key, position: jax.Array, options: Options) -> jax.Array:
    key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=SCORES)
    last = lax.broadcast_in_dim(position - first_key, scores.shape, [0])
    visible = key <= last
    if options.window is not None:
        visible &= key > last - options.window
    return jnp.where(visible, scores, -jnp.inf)


def _clear_unseen(v_smem, first_key, part: Part, shape: Shape, options: Options) -> None:
    """Zeroes the values of keys that no query sees: their weight is 0, but they may be NaN."""
    low = jnp.int32(0)
    if options.window is not None:
        low = part.length - shape.queries - options.window + 1 - first_key
    high = part.length - first_key

    @pl.when((high < TILE_KEYS) | (low > 0))
    def _():
        v = plgpu.load(v_smem, layout=SCORES)
        key = plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=SCORES)
        v_smem[...] = jnp.where((key >= low) & (key < high), v, jnp.zeros_like(v))
        plgpu.commit_smem()


def _add_product(values: jax.Array, weights: jax.Array, scratch: Scratch, v_smem, config: Config) -> jax.Array:
    if not config.interpretable:
        add = pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, weights, v_smem))
        return cast(jax.Array, add(plgpu.WGMMAAccumulatorRef.init(values)))
    weights_smem = scratch.weights.at[lax.axis_index("role") - 1]
    weights_smem[...] = weights
    plgpu.commit_smem()
    return values + _product(weights_smem, v_smem, values.shape[1])


def _store(
    inputs: Inputs, outputs: Outputs, scratch: Scratch, part: Part, softmax, *, shape: Shape, config: Config
) -> None:
    """Writes the result of a whole unit, or leaves that of a part to be joined."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the unit before
    out_smem, part_smem, _ = scratch.results
    lse_smem = scratch.statistics.at[0]
    rows = pl.ds(0, shape.stored_rows)
    out, lse = _normalized(*softmax)

    @pl.when(part.whole)
    def _():
        finished, finished_lse = _finished(inputs, part, out, lse)
        unit = part.slot * shape.units + part.unit
        out_smem[...] = finished.astype(shape.dtype)
        lse_smem[...] = finished_lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[rows], outputs.out.at[unit])
        plgpu.copy_smem_to_gmem(lse_smem, outputs.lse.at[unit])

    @pl.when(jnp.logical_not(part.whole))
    def _():
        cta = lax.axis_index("cta")
        index = partial_index(cta, part.done == 0, config.ctas)
        part_smem[...] = out
        lse_smem[...] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(part_smem.at[rows], outputs.part.at[index, :, pl.ds(0, shape.head_size)])
        plgpu.copy_smem_to_gmem(lse_smem, outputs.part_lse.at[index])
        if not config.interpretable:
            owner = inputs.work[cta, 4]

            @pl.when((part.done == 0) & (owner != cta))
            def _():
                plgpu.wait_smem_to_gmem(0)
                signal(inputs.tickets.at[owner, 0])


def _join_own(inputs: Inputs, outputs: Outputs, rows_smem) -> None:
    """Joins the parts of the unit that begins in this CTA's stretch, when the other CTAs have written theirs."""
    cta = lax.axis_index("cta")

    @pl.when(inputs.merge[cta, 0] >= 0)
    def _():
        plgpu.wait_smem_to_gmem(0)
        wait_for(inputs.tickets.at[cta, 0], inputs.merge.at[cta, 3])

    join(inputs.merge, outputs.part, outputs.part_lse, inputs.sinks, outputs.out, outputs.lse, rows_smem)


def _normalized(values, maximum, total) -> tuple[jax.Array, jax.Array]:
    """The mean of the values and the natural log-sum-exp; 0 and -inf in rows that saw nothing."""
    seen = total > 0
    inverse = jnp.where(seen, 1 / total, 0.0)
    lse = jnp.where(seen, maximum * (1 / LOG2_E) + jnp.log(total), -jnp.inf)
    return values * lax.broadcast_in_dim(inverse, values.shape, [0]), lse


def _finished(inputs: Inputs, part: Part, out, lse) -> tuple[jax.Array, jax.Array]:
    """With the sink of each head, where the model has them."""
    if inputs.sinks is None:
        return out, lse
    sink = plgpu.load(inputs.sinks.at[part.unit], layout=BY_ROW, optimized=False)
    lse, decay = with_sink(lse, sink)
    return out * lax.broadcast_in_dim(decay, out.shape, [0]), lse

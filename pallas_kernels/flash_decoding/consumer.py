"""The warpgroups of the decode kernel that compute: attention of a unit's rows to its tiles, and its results."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blockwise import LOWEST, Options
from pallas_kernels.flash_decoding.config import ROWS, TILE_KEYS, Config
from pallas_kernels.flash_decoding.merge import join, signal, wait_for, with_sink
from pallas_kernels.flash_decoding.schedule import partial_index
from pallas_kernels.flash_decoding.shared import Inputs, Outputs, Part, Scratch
from pallas_kernels.flash_decoding.tree import WORD, first_new_tile
from pallas_kernels.flash_decoding.units import Shape

LOG2_E = math.log2(math.e)
SCORES = plgpu.Layout.WGMMA
BY_ROW = plgpu.Layout.WGMMA.reduce(1)


def compute(
    inputs: Inputs, outputs: Outputs, scratch: Scratch, part: Part, *, shape: Shape, options: Options, config: Config
) -> None:
    """Attention of a unit's rows to the tiles of this part, online (FlashAttention-2, Dao 2023, algorithm 1)."""
    consumer = lax.axis_index("role") - 1
    buffer = lax.rem(part.nth, config.q_buffers)
    position = _positions(inputs, part, shape)
    plgpu.barrier_wait(scratch.q_ready.at[buffer])
    tile = partial(_tile, scratch, part, position, buffer, shape=shape, options=options, config=config)
    zeros = plgpu.layout_cast(jnp.zeros((ROWS, shape.head_size), jnp.float32), SCORES)
    row = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), BY_ROW)
    # Tiles go around among the consumers; which one is first depends on the tiles that came before.
    first = lax.rem(consumer + config.consumers - lax.rem(part.done, config.consumers), config.consumers)
    turns = lambda tiles: (tiles - first + config.consumers - 1) // config.consumers  # noqa: E731
    own = lambda turn, carry, tree=None: tile(tree, first + turn * config.consumers, carry)  # noqa: E731
    begin, end = 0, turns(part.count)
    softmax = (zeros, row + LOWEST, row)
    if inputs.tree is not None:  # first the tiles without new keys
        begin = turns(jnp.clip(first_new_tile(part.length, shape.queries) - part.tile, 0, part.count))
        softmax = lax.fori_loop(0, begin, own, softmax)
    softmax = lax.fori_loop(begin, end, partial(own, tree=inputs.tree), softmax)
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


def _positions(inputs: Inputs, part: Part, shape: Shape) -> jax.Array:
    """The position of every row's query."""
    if inputs.tree is not None and inputs.tree.depth is not None:
        depth = plgpu.load(inputs.tree.depth.at[_block(part, shape)], layout=BY_ROW, optimized=False)
        return part.length - shape.queries + depth
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=BY_ROW)
    block = lax.rem(part.unit, shape.blocks)
    return part.length - shape.queries + (block * shape.rows + row) // shape.group


def _block(part: Part, shape: Shape):
    """The number, among those of all slots, of the block of rows that a unit has."""
    return part.slot * shape.blocks + lax.rem(part.unit, shape.blocks)


def _tile(
    scratch: Scratch, part: Part, position, buffer, tree, i, carry, *, shape: Shape, options: Options, config: Config
):  # fmt: skip
    values, maximum, total = carry
    first_key = (part.tile + i) * TILE_KEYS
    bits = None if tree is None else _bits_of_tile(tree, part, part.tile + i, shape)
    stage = lax.rem(part.done + i, config.stages)
    plgpu.barrier_wait(scratch.k_ready.at[stage])
    scores = _product(scratch.q.at[buffer], scratch.k.at[stage].T, TILE_KEYS)
    scores = _scaled(scores, options)
    if bits is None:
        scores = _masked(scores, first_key, position, options)
    else:
        key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=SCORES)
        scores = jnp.where(_bit(bits.rows, key), scores, -jnp.inf)
    new_maximum = jnp.maximum(maximum, scores.max(axis=1))
    decay = jnp.exp2(maximum - new_maximum)
    weights = jnp.exp2(scores - lax.broadcast_in_dim(new_maximum, scores.shape, [0]))
    total = total * decay + weights.sum(axis=1)
    values = values * lax.broadcast_in_dim(decay, values.shape, [0])
    plgpu.barrier_wait(scratch.v_ready.at[stage])
    if bits is None:
        _clear_unseen(scratch.v.at[stage], first_key, part, shape, options)
    else:
        _clear(scratch.v.at[stage], lambda key: _bit(bits.any, key))
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
        _clear(v_smem, lambda key: (key >= low) & (key < high))


def _clear(v_smem, keep: Callable[[jax.Array], jax.Array]) -> None:
    v = plgpu.load(v_smem, layout=SCORES)
    key = plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=SCORES)
    v_smem[...] = jnp.where(keep(key), v, jnp.zeros_like(v))
    plgpu.commit_smem()


class _Bits(NamedTuple):
    """The keys of a tile that are seen, in two words: by every row, and by any query of the slot."""

    rows: tuple[jax.Array, jax.Array]
    any: tuple[jax.Array, jax.Array]


def _bits_of_tile(tree: Any, part: Part, tile, shape: Shape) -> _Bits:
    nth = tile - first_new_tile(part.length, shape.queries)
    words = [tree.words.at[_block(part, shape), 2 * nth + half] for half in range(2)]
    low, high = (plgpu.load(word, layout=BY_ROW, optimized=False) for word in words)
    return _Bits((low, high), (tree.any[part.slot, 2 * nth], tree.any[part.slot, 2 * nth + 1]))


def _bit(words: tuple[jax.Array, jax.Array], key: jax.Array) -> jax.Array:
    """The bits of keys 0 to 63; words are scalars, or one for each row of `key`."""
    low, high = (word if word.ndim == 0 else lax.broadcast_in_dim(word, key.shape, [0]) for word in words)
    return (jnp.where(key < WORD, low, high) >> (key & (WORD - 1))) & 1 != 0


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


def join_own(inputs: Inputs, outputs: Outputs, rows_smem) -> None:
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

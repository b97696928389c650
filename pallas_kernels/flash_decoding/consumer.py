"""The warpgroups of the decode kernel that compute: attention of a unit's rows to its tiles, and its results."""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.blockwise import LOG2E, LOWEST, Options, log2_size
from pallas_kernels.flash_decoding import quantized
from pallas_kernels.flash_decoding.config import ROWS, TILE_KEYS, Config
from pallas_kernels.flash_decoding.merge import join, with_sink
from pallas_kernels.flash_decoding.schedule import partial_index
from pallas_kernels.flash_decoding.shared import Inputs, Outputs, Part, Scratch, product_rows, stretch_of
from pallas_kernels.flash_decoding.tree import WORD, first_new_tile
from pallas_kernels.flash_decoding.units import Shape

SCORES = plgpu.Layout.WGMMA
BY_ROW = plgpu.Layout.WGMMA.reduce(1)


def compute(
    inputs: Inputs, outputs: Outputs, scratch: Scratch, part: Part, *, shape: Shape, options: Options, config: Config
) -> None:
    """Attention of a unit's rows to the tiles of this part, online (FlashAttention-2, Dao 2023, algorithm 1)."""
    buffer = part.q_buffer(config)
    position = _positions(inputs, part, shape)
    plgpu.barrier_wait(scratch.q_ready.at[buffer])
    q = scratch.q.at[part.queries(shape, config, product_rows(shape))]
    attend = _quantized_tile if shape.quantized else _tile
    tile = partial(attend, scratch, part, position, q, shape=shape, options=options, config=config)
    begin, softmax = 0, _nothing_seen(shape)
    if inputs.tree is not None:  # first the tiles without new keys
        begin = jnp.clip(first_new_tile(part.length, shape.queries) - part.tile, 0, part.count)
        softmax = lax.fori_loop(0, begin, partial(tile, None), softmax)
    softmax = lax.fori_loop(begin, part.count, partial(tile, inputs.tree), softmax)
    plgpu.barrier_arrive(scratch.q_free.at[buffer])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # results of the unit before
    if shape.quantized:
        softmax = _by_row(scratch, part, softmax, config)
    _store(inputs, outputs, scratch, part, softmax, shape=shape, config=config)


def clear_empty(
    inputs: Inputs, outputs: Outputs, scratch: Scratch, pipeline, stretch, *, shape: Shape, config: Config
):
    """Writes the results of the empty slots that fall to a stretch, of which the schedule says nothing."""
    out_smem, lse_smem = scratch.out.at[pipeline], scratch.statistics.at[pipeline, 0]
    rows = pl.ds(0, shape.stored_rows)

    @pl.loop(0, lax.div(shape.slots - 1 - stretch + config.stretches, config.stretches))
    def _(nth):
        slot = stretch + nth * config.stretches

        @pl.when(inputs.lengths[slot] == 0)
        def _():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[...] = plgpu.layout_cast(jnp.zeros(out_smem.shape, out_smem.dtype), SCORES)
            lse_smem[...] = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), BY_ROW)
            plgpu.commit_smem()

            @pl.loop(slot * shape.units, (slot + 1) * shape.units)
            def _(unit):
                plgpu.copy_smem_to_gmem(out_smem.at[rows], outputs.out.at[unit])
                plgpu.copy_smem_to_gmem(lse_smem, outputs.lse.at[unit])


def _nothing_seen(shape: Shape) -> tuple[jax.Array, ...]:
    """Values, maximum in units of log 2, and total of a softmax without keys; quantized, the total is still by key."""
    rows, by_row = _rows(shape)
    zeros = lambda shape, layout: plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)  # noqa: E731
    maximum = zeros((rows,), by_row) + LOWEST
    if shape.quantized:
        return zeros((quantized.value_rows(shape.head_size), rows), SCORES), maximum, zeros((TILE_KEYS, rows), SCORES)
    return zeros((rows, shape.head_size), SCORES), maximum, zeros((rows,), by_row)


def _by_row(scratch: Scratch, part: Part, softmax, config: Config) -> tuple[jax.Array, ...]:
    """A quantized softmax with one row for every query row."""
    values, maximum, total = softmax
    rows = pl.ds(0, len(maximum))
    total = quantized.over_keys("add", total, scratch.meeting.at[part.pipeline], config.interpretable)
    values_smem, statistics = scratch.part[0].at[part.pipeline], scratch.statistics.at[part.pipeline]
    quantized.store_by_row(values, values_smem.at[rows], config.interpretable)
    statistics[0, rows], statistics[1, rows] = maximum, total
    plgpu.commit_smem()
    values = plgpu.load(values_smem, layout=SCORES, optimized=False)
    maximum, total = (plgpu.load(statistics.at[i], layout=BY_ROW) for i in range(2))
    plgpu.commit_smem()  # all have read before anyone writes
    return values, maximum, total


def _positions(inputs: Inputs, part: Part, shape: Shape) -> jax.Array:
    """The position of every row's query."""
    rows, layout = _rows(shape)
    if inputs.tree is not None and inputs.tree.depth is not None:
        depth = inputs.tree.depth.at[_block(part, shape), pl.ds(0, rows)]
        return part.length - shape.queries + plgpu.load(depth, layout=layout, optimized=False)
    row = plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=layout)
    block = lax.rem(part.unit, shape.blocks)
    return part.length - shape.queries + (block * shape.rows + row) // shape.group


def _rows(shape: Shape) -> tuple[int, Any]:
    """Of a block, as the products take them, and the layout of what each has one of."""
    return product_rows(shape), quantized.BY_ROW if shape.quantized else BY_ROW


def _block(part: Part, shape: Shape):
    """The number, among those of all slots, of the block of rows that a unit has."""
    return part.slot * shape.blocks + lax.rem(part.unit, shape.blocks)


def _tile(
    scratch: Scratch, part: Part, position, q, tree, i, carry, *, shape: Shape, options: Options, config: Config
):  # fmt: skip
    values, maximum, total = carry
    stage = part.stage(i, config)
    mask = _mask(tree, part, part.tile + i, position, shape, options)
    plgpu.barrier_wait(scratch.k_ready.at[stage])
    scores = _product(q, scratch.k.at[stage].T, TILE_KEYS)
    scores = mask.apply(_scaled(scores, options), key_axis=1)
    new_maximum = jnp.maximum(maximum, scores.max(axis=1))
    decay = jnp.exp2(maximum - new_maximum)
    weights = jnp.exp2(scores - lax.broadcast_in_dim(new_maximum, scores.shape, [0]))
    total = total * decay + weights.sum(axis=1)
    values = values * lax.broadcast_in_dim(decay, values.shape, [0])
    plgpu.barrier_wait(scratch.v_ready.at[stage])
    _clear_unseen(scratch.v.at[stage], mask.seen)
    values = _add_product(values, weights.astype(shape.dtype), scratch, part, scratch.v.at[stage], config)
    plgpu.barrier_arrive(scratch.tile_free.at[stage])
    return values, new_maximum, total


def _quantized_tile(
    scratch: Scratch, part: Part, position, q, tree, i, carry, *, shape: Shape, options: Options, config: Config
):  # fmt: skip
    """The same with the keys as rows of the scores, and the components of the values as rows of theirs.

    A weight is multiplied by the scale of its value before it is rounded. That no product exceeds 1, the softmax is
    taken relative to the largest of them, not of the weights.
    """
    values, maximum, total = carry
    stage = part.stage(i, config)
    mask = _mask(tree, part, part.tile + i, position, shape, options)
    k_smem, v_smem = (x and x.at[part.pipeline] for x in scratch.operands or (None, None))
    weights_smem, meeting = scratch.weights.at[part.pipeline], scratch.meeting.at[part.pipeline]

    def load_values():
        plgpu.barrier_wait(scratch.v_ready.at[stage])
        return quantized.values_operand(scratch.v.at[stage], mask.seen, v_smem)

    plgpu.barrier_wait(scratch.k_ready.at[stage])
    k = quantized.keys_operand(scratch.k.at[stage], k_smem)
    scores, v = _product_meanwhile(k, q.T, shape.padded_rows, load_values, config)
    k_scale = plgpu.load(scratch.k_scales.at[stage], layout=quantized.BY_KEY) * quantized.query_unit(shape.dtype)
    scores = _scaled(scores * lax.broadcast_in_dim(k_scale, scores.shape, [0]), options)
    scores = mask.apply(scores, key_axis=0)
    v_scale = plgpu.load(scratch.v_scales.at[stage], layout=quantized.BY_KEY)
    key = plgpu.broadcasted_iota(jnp.int32, v_scale.shape, 0, layout=quantized.BY_KEY)
    v_scale = jnp.where(mask.seen.of(key), v_scale, 0.0)
    products = scores + lax.broadcast_in_dim(log2_size(v_scale), scores.shape, [0])
    largest = quantized.over_keys("max", products, meeting, config.interpretable)
    new_maximum = jnp.maximum(maximum, largest)
    decay = jnp.exp2(maximum - new_maximum)
    weights = jnp.exp2(scores - lax.broadcast_in_dim(new_maximum, scores.shape, [1]))
    total = total * lax.broadcast_in_dim(decay, total.shape, [1]) + weights
    weights = (weights * lax.broadcast_in_dim(v_scale, weights.shape, [0])).astype(quantized.OPERAND)
    if config.interpretable:
        weights_smem[...] = weights.T
    else:
        weights_smem.T[...] = plgpu.layout_cast(weights, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.barrier_arrive(scratch.tile_free.at[stage])  # the tile is in registers
    values = values * lax.broadcast_in_dim(decay, values.shape, [1])
    return _add(values, v, weights_smem.T, config), new_maximum, total


def _product(a, b, columns: int) -> jax.Array:
    def multiply(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], columns), jnp.float32))


def _product_meanwhile(a, b, columns: int, work, config: Config) -> tuple[jax.Array, Any]:
    """A product, and the result of `work`, which is done while the tensor cores multiply."""
    if config.interpretable:
        return _product(a, b, columns), work()

    def multiply(accumulator):
        plgpu.wgmma(accumulator, a, b)
        result = work()
        return accumulator[...], result

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], columns), jnp.float32))


def _scaled(scores: jax.Array, options: Options) -> jax.Array:
    """In base 2, so that an exponential is one instruction."""
    if options.soft_cap is None:
        return scores * (options.scale * LOG2E)
    return jnp.tanh(scores * (options.scale / options.soft_cap)) * (options.soft_cap * LOG2E)


class _Seen(NamedTuple):
    """The keys of a tile that any query sees: those of [low, high), or with a tree those whose bits are 1."""

    low: jax.Array
    high: jax.Array
    as_bits: bool

    def of(self, key: jax.Array) -> jax.Array:
        return _bit((self.low, self.high), key) if self.as_bits else (key >= self.low) & (key < self.high)


class _Mask(NamedTuple):
    """Which keys of a tile every row sees: those up to `last`, `window` of them, or with a tree those whose bits are 1
    in two words."""

    seen: _Seen
    last: jax.Array
    window: int | None
    bits: tuple[jax.Array, jax.Array] | None

    def apply(self, scores: jax.Array, key_axis: int) -> jax.Array:
        key = plgpu.broadcasted_iota(jnp.int32, scores.shape, key_axis, layout=SCORES)
        if self.bits is not None:
            return jnp.where(_bit(self.bits, key, 1 - key_axis), scores, -jnp.inf)
        last = lax.broadcast_in_dim(self.last, scores.shape, [1 - key_axis])
        visible = key <= last
        if self.window is not None:
            visible &= key > last - self.window
        return jnp.where(visible, scores, -jnp.inf)


def _mask(tree, part: Part, tile, position: jax.Array, shape: Shape, options: Options) -> _Mask:
    first_key = tile * TILE_KEYS
    last = position - first_key
    if tree is None:
        low = jnp.int32(0)
        if options.window is not None:
            low = part.length - shape.queries - options.window + 1 - first_key
        return _Mask(_Seen(low, part.length - first_key, False), last, options.window, None)
    rows, layout = _rows(shape)
    nth = 2 * (tile - first_new_tile(part.length, shape.queries))
    words = (tree.words.at[_block(part, shape), nth + half, pl.ds(0, rows)] for half in range(2))
    low, high = (plgpu.load(word, layout=layout, optimized=False) for word in words)
    seen = _Seen(tree.any[part.slot, nth], tree.any[part.slot, nth + 1], True)
    return _Mask(seen, last, options.window, (low, high))


def _bit(words: tuple[jax.Array, jax.Array], key: jax.Array, axis: int = 0) -> jax.Array:
    """The bits of keys 0 to 63; words are scalars, or one for each place of an axis of `key`."""
    low, high = (word if word.ndim == 0 else lax.broadcast_in_dim(word, key.shape, [axis]) for word in words)
    return (jnp.where(key < WORD, low, high) >> (key & (WORD - 1))) & 1 != 0


def _clear_unseen(v_smem, seen: _Seen) -> None:
    """Zeroes the values of keys that no query sees: their weight is 0, but they may be NaN."""

    def clear() -> None:
        v = plgpu.load(v_smem, layout=SCORES)
        key = plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=SCORES)
        v_smem[...] = jnp.where(seen.of(key), v, jnp.zeros_like(v))
        plgpu.commit_smem()

    if seen.as_bits:
        clear()
    else:
        pl.when((seen.high < TILE_KEYS) | (seen.low > 0))(clear)


def _add_product(
    values: jax.Array, weights: jax.Array, scratch: Scratch, part: Part, v_smem, config: Config
) -> jax.Array:
    if config.interpretable:
        weights_smem = scratch.weights.at[part.pipeline]
        weights_smem[...] = weights
        plgpu.commit_smem()
        weights = weights_smem
    return _add(values, weights, v_smem, config)


def _add(values: jax.Array, a, b, config: Config) -> jax.Array:
    """values + a b."""
    if config.interpretable:
        return values + _product(a, b, values.shape[1])
    add = pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))
    return cast(jax.Array, add(plgpu.WGMMAAccumulatorRef.init(values)))


def _store(
    inputs: Inputs, outputs: Outputs, scratch: Scratch, part: Part, softmax, *, shape: Shape, config: Config
) -> None:
    """Writes the result of a whole unit, or leaves that of a part to be joined."""
    out, lse = _normalized(*softmax)
    pl.when(part.whole)(lambda: _store_unit(inputs, outputs, scratch, part, out, lse, shape))
    pl.when(jnp.logical_not(part.whole))(lambda: _store_part(inputs, outputs, scratch, part, out, lse, shape, config))


def _store_unit(inputs: Inputs, outputs: Outputs, scratch: Scratch, part: Part, out, lse, shape: Shape) -> None:
    out, lse = _finished(inputs, part, out, lse)
    out_smem, lse_smem = scratch.out.at[part.pipeline], scratch.statistics.at[part.pipeline, 0]
    unit = part.slot * shape.units + part.unit
    out_smem[...] = out.astype(shape.dtype)
    lse_smem[...] = lse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, shape.stored_rows)], outputs.out.at[unit])
    plgpu.copy_smem_to_gmem(lse_smem, outputs.lse.at[unit])


def _store_part(
    inputs: Inputs, outputs: Outputs, scratch: Scratch, part: Part, out, lse, shape: Shape, config: Config
) -> None:
    stretch = stretch_of(part.pipeline, config)
    index = partial_index(stretch, part.done == 0, config.stretches)
    part_smem, lse_smem = scratch.part[0].at[part.pipeline], scratch.statistics.at[part.pipeline, 0]
    width = part_smem.shape[1]
    lse_smem[...] = lse
    for column in range(0, shape.head_size, width):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        values = out[:, column : column + width]
        if shape.quantized and not config.interpretable:
            hopper.store_in_rows(values, part_smem)  # as `quantized.store_by_row` has it
        else:
            part_smem[...] = values
        plgpu.commit_smem()
        target = outputs.part.at[index, :, pl.ds(column, width)]
        plgpu.copy_smem_to_gmem(part_smem.at[pl.ds(0, shape.stored_rows)], target)
    plgpu.copy_smem_to_gmem(lse_smem, outputs.part_lse.at[index])
    if not config.interpretable:
        owner = inputs.work[stretch, 4]

        @pl.when((part.done == 0) & (owner != stretch))
        def _():
            plgpu.wait_smem_to_gmem(0)
            hopper.signal(inputs.tickets.at[owner, 0])


def join_own(inputs: Inputs, outputs: Outputs, stretch, rows_smem) -> None:
    """Joins the parts of the unit that begins in a stretch, when those of the others are written."""

    @pl.when(inputs.merge[stretch, 0] >= 0)
    def _():
        plgpu.wait_smem_to_gmem(0)
        hopper.wait_for(inputs.tickets.at[stretch, 0], inputs.merge[stretch, 3])

    join(stretch, inputs.merge, outputs.part, outputs.part_lse, inputs.sinks, outputs.out, outputs.lse, rows_smem)


def _normalized(values, maximum, total) -> tuple[jax.Array, jax.Array]:
    """The mean of the values and the natural log-sum-exp; 0 and -inf in rows that saw nothing."""
    seen = total > 0
    inverse = jnp.where(seen, 1 / total, 0.0)
    lse = jnp.where(seen, maximum * (1 / LOG2E) + jnp.log(total), -jnp.inf)
    return values * lax.broadcast_in_dim(inverse, values.shape, [0]), lse


def _finished(inputs: Inputs, part: Part, out, lse) -> tuple[jax.Array, jax.Array]:
    """With the sink of each head, where the model has them."""
    if inputs.sinks is None:
        return out, lse
    sink = plgpu.load(inputs.sinks.at[part.unit], layout=BY_ROW, optimized=False)
    lse, decay = with_sink(lse, sink)
    return out * lax.broadcast_in_dim(decay, out.shape, [0]), lse

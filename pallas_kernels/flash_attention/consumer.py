"""The warpgroups of the prefill kernel that compute: two products and an online softmax (FlashAttention-3)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.blockwise import LOG2E, LOWEST, Options, log2_size
from pallas_kernels.flash_attention import schedule
from pallas_kernels.flash_attention.config import CONSUMERS, TMA_ALIGNMENT
from pallas_kernels.flash_attention.schedule import ROW_ALIGNMENT, Blocks, Tile
from pallas_kernels.flash_attention.shared import Meeting, Problem, Refs, Signals

LAYOUT_QC = plgpu.Layout.WGMMA
LAYOUT_Q, LAYOUT_C = LAYOUT_QC.reduce(1), LAYOUT_QC.reduce(0)
PARTIAL_SUMS = 8  # columns of LAYOUT_QC after which it comes back to the same thread


class Softmax(NamedTuple):
    """A softmax under way: unnormalized values, maximum in units of log 2, sum.

    The sum is in parts, one for the columns 0, 8, 16, ... of each block, one for 1, 9, 17, ...: a thread adds up its
    own weights, and threads exchange sums only at the end.
    """

    values_QH: jax.Array
    max_Q: jax.Array
    sum_Q8: jax.Array


def compute(
    problem: Problem, refs: Refs, smem: dict, signals: Signals, warpgroup, tile: Tile, keys: Blocks, head, done
) -> None:
    """A consumer's part of an item."""
    config = problem.config
    row = pl.multiple_of(tile.row + warpgroup * config.block_q, ROW_ALIGNMENT)
    start = Softmax(
        plgpu.layout_cast(jnp.zeros((config.block_q, problem.head_size), jnp.float32), LAYOUT_QC),
        plgpu.layout_cast(jnp.full((config.block_q,), LOWEST, jnp.float32), LAYOUT_Q),
        plgpu.layout_cast(jnp.zeros((config.block_q, PARTIAL_SUMS), jnp.float32), LAYOUT_QC),
    )

    def nothing_seen():
        signals.q_free.send()
        return start

    plgpu.barrier_wait(smem["q_full"])
    attend = partial(_attend, problem, smem, signals, warpgroup, tile, keys, row + tile.shift, done, start)
    softmax = lax.cond(keys.total > 0, attend, nothing_seen)
    out_QH, lse_Q = _finish(softmax, None if refs.sinks is None else refs.sinks[head])
    _store(problem, smem, refs, warpgroup, tile, row, head, out_QH, lse_Q)


def _attend(problem, smem, signals, warpgroup, tile, keys: Blocks, position, done, start: Softmax) -> Softmax:
    """All blocks of keys, the last one first: the diagonal is then behind when the others begin."""
    config, q_rows = problem.config, pl.ds(warpgroup * problem.config.block_q, problem.config.block_q)
    q = smem["q"].at[q_rows]
    products = Products(q, smem["p"].at[warpgroup] if config.interpretable else None)
    pass_turn = partial(signals.turn.send, 1 - warpgroup)

    def slot_of(i):
        return lax.rem(done + i, jnp.int32(config.stages))

    def await_keys(i):
        plgpu.barrier_wait(smem["k_full"].at[slot_of(i)])
        signals.turn.wait(warpgroup)
        return smem["k"].at[slot_of(i)]

    def await_values(i, masked):
        plgpu.barrier_wait(smem["v_full"].at[slot_of(i)])
        if masked:
            _clean(problem, warpgroup, smem["v"].at[slot_of(i)], signals.cleaned, tile, keys.nth(i))

    def softmax_of(i, masked, scores_QC, max_Q, sum_Q8):
        distance = position - keys.nth(i) * config.block_kv
        if not problem.quantized:
            signals.k_free.send(slot_of(i))
            if not config.interpretable:
                hopper.complete(slot_of(i))
            return _row_softmax(problem.options, distance, masked, scores_QC, max_Q, sum_Q8)
        scales = (plgpu.load(smem["scales"].at[kind, slot_of(i)], layout=LAYOUT_C) for kind in range(2))
        results = _row_softmax(
            problem.options, distance, masked, scores_QC, max_Q, sum_Q8, *scales, in_float16=q.dtype == jnp.float16
        )
        signals.k_free.send(slot_of(i))
        return results

    def first():
        scores_QC = products.scores(await_keys(0), pass_turn)
        max_Q, sum_Q8, _, p_QC = softmax_of(0, True, scores_QC, start.max_Q, start.sum_Q8)
        await_values(0, True)
        return Softmax(start.values_QH, max_Q, sum_Q8), p_QC.astype(q.dtype)

    def step(masked, i, carry):
        softmax, p_QC = carry
        k, v = await_keys(i), smem["v"].at[slot_of(i - 1)]
        softmax, p_QC = products.both(softmax, p_QC, k, v, pass_turn, partial(softmax_of, i, masked))
        signals.v_free.send(slot_of(i - 1))
        await_values(i, masked)
        return softmax, p_QC

    clean_from = jnp.maximum(keys.high - keys.clean_high, 1)
    clean_to = jnp.maximum(keys.high - keys.clean_low, clean_from)
    carry = lax.fori_loop(1, jnp.minimum(clean_from, keys.total), partial(step, True), first())
    carry = lax.fori_loop(clean_from, jnp.minimum(clean_to, keys.total), partial(step, False), carry)
    if problem.options.window is not None:
        carry = lax.fori_loop(clean_to, keys.total, partial(step, True), carry)
    signals.q_free.send()
    softmax, p_QC = carry
    values_QH = products.values(softmax.values_QH, p_QC, smem["v"].at[slot_of(keys.total - 1)])
    signals.v_free.send(slot_of(keys.total - 1))
    return softmax._replace(values_QH=values_QH)


@dataclass(frozen=True)
class Products:
    """The two products on the tensor cores; `p` is memory for the weights where they cannot stay in registers."""

    q: jax.Ref
    p: jax.Ref | None

    def scores(self, k, issued) -> Any:
        def product(scores_ref):
            plgpu.wgmma(scores_ref, self.q, k.transpose((1, 0)))
            issued()
            return scores_ref[...]

        return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((self.q.shape[0], k.shape[0]), jnp.float32))

    def values(self, values_QH, p_QC, v) -> Any:
        if self.p is None:
            return pl.run_state(lambda values_ref: plgpu.wgmma(values_ref, p_QC, v))(
                plgpu.WGMMAAccumulatorRef.init(values_QH)
            )

        def product(values_ref):
            plgpu.wgmma(values_ref, self.p, v)
            return values_ref[...]

        self.p[...] = p_QC
        plgpu.commit_smem()
        return values_QH + pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(values_QH.shape, jnp.float32))

    def both(self, softmax: Softmax, p_QC, k, v, issued, row_softmax) -> tuple[Softmax, jax.Array]:
        """Issues the scores of the next keys and the values of these; does the next softmax under the latter."""
        if self.p is not None:
            scores_QC = self.scores(k, issued)
            max_Q, sum_Q8, decay_Q, new_p_QC = row_softmax(scores_QC, softmax.max_Q, softmax.sum_Q8)
            values_QH = self.values(softmax.values_QH, p_QC, v)
        else:
            values_QH, max_Q, sum_Q8, decay_Q, new_p_QC = self._overlapped(softmax, p_QC, k, v, issued, row_softmax)
        values_QH = values_QH * lax.broadcast_in_dim(decay_Q, values_QH.shape, [0])
        return Softmax(values_QH, max_Q, sum_Q8), new_p_QC.astype(p_QC.dtype)

    def _overlapped(self, softmax: Softmax, p_QC, k, v, issued, row_softmax) -> Any:
        def body(refs):
            values_ref, *result_refs = refs

            def issue(scores_ref):
                plgpu.wgmma(scores_ref, self.q, k.transpose((1, 0)))
                plgpu.wgmma(values_ref, p_QC, v)
                issued()
                return plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)

            scores_QC = pl.run_scoped(issue, plgpu.WGMMAAccumulatorRef(p_QC.shape, jnp.float32))
            results = row_softmax(scores_QC, softmax.max_Q, softmax.sum_Q8)
            hopper.complete(results[1], LAYOUT_QC)
            for ref, result in zip(result_refs, results, strict=True):
                ref[...] = result

        # run_state returns what its references hold at the end, when it has waited for the values.
        no_p_QC = plgpu.layout_cast(jnp.zeros(p_QC.shape, jnp.float32), LAYOUT_QC)
        placeholders = (softmax.max_Q, softmax.sum_Q8, softmax.max_Q, no_p_QC)
        return pl.run_state(body)((plgpu.WGMMAAccumulatorRef.init(softmax.values_QH), *placeholders))


def _row_softmax(
    options: Options, distance, masked: bool, scores_QC, max_Q, sum_Q8, k_scale_C=None, v_scale_C=None, *,
    in_float16: bool = False,
):  # fmt: skip
    """Takes a block into the softmax: new maximum and sum, the decay of what came before, the block's weights.

    `distance` is the first row's position less the first key's. A row that has seen nothing keeps the maximum
    LOWEST, against which a masked score weighs exactly 0. The scales of what is masked may be NaN.

    A weight is multiplied by the scale of its value before it is rounded. Where that is to float16 (`in_float16`) the
    maximum is over these products, which it keeps in its range; bfloat16 has that of the scales.
    """
    scale, visible_QC, shape = options.scale * LOG2E, None, scores_QC.shape
    if k_scale_C is not None:
        scores_QC = scores_QC * lax.broadcast_in_dim(k_scale_C, shape, [1])
    if options.soft_cap is not None:
        scores_QC = jnp.tanh(scores_QC * (options.scale / options.soft_cap))
        scale = options.soft_cap * LOG2E
    if masked:
        key_QC = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=LAYOUT_QC)
        last_Q = plgpu.broadcasted_iota(jnp.int32, max_Q.shape, 0, layout=LAYOUT_Q) + distance
        visible_QC = key_QC <= lax.broadcast_in_dim(last_Q, shape, [0])
        if options.window is not None:
            visible_QC &= key_QC > lax.broadcast_in_dim(last_Q - options.window, shape, [0])
        scores_QC = jnp.where(visible_QC, scores_QC, -jnp.inf)
    if v_scale_C is not None and in_float16:
        products_QC = scores_QC * scale + lax.broadcast_in_dim(log2_size(v_scale_C), shape, [1])
        products_QC = products_QC if visible_QC is None else jnp.where(visible_QC, products_QC, -jnp.inf)
        largest_Q = products_QC.max(axis=1)
    else:
        largest_Q = scores_QC.max(axis=1) * scale
    new_max_Q = jnp.maximum(max_Q, largest_Q)
    decay_Q = jnp.exp2(max_Q - new_max_Q)
    p_QC = jnp.exp2(scores_QC * scale - lax.broadcast_in_dim(new_max_Q, shape, [0]))
    parts = (p_QC[:, column : column + PARTIAL_SUMS] for column in range(0, shape[1], PARTIAL_SUMS))
    sum_Q8 = sum_Q8 * lax.broadcast_in_dim(decay_Q, sum_Q8.shape, [0]) + reduce(jnp.add, parts)
    if v_scale_C is not None:
        p_QC = p_QC * lax.broadcast_in_dim(v_scale_C, shape, [1])
        p_QC = p_QC if visible_QC is None else jnp.where(visible_QC, p_QC, 0.0)
    return new_max_Q, sum_Q8, decay_Q, p_QC


def _clean(problem: Problem, warpgroup, v, cleaned: Meeting, tile: Tile, block):
    """Zeroes those values of a block that no query of the sequence sees.

    Their weights are 0, but they may be NaN, and 0 times NaN is NaN. Both consumers read them: each cleans its part
    and waits for the other.
    """
    block_kv, part = problem.config.block_kv, 64
    first_key = block * block_kv
    seen = schedule.keys_in_sight(tile, problem.options.window)

    @pl.when((first_key + block_kv > seen.end) | (first_key < seen.begin))
    def _():
        for i in range(block_kv // part):

            @pl.when(warpgroup == i % CONSUMERS)
            def _(i=i):
                rows = pl.ds(i * part, part)
                value_CH = v[rows]
                key_CH = plgpu.broadcasted_iota(jnp.int32, value_CH.shape, 0, layout=LAYOUT_QC) + first_key + i * part
                v[rows] = jnp.where((key_CH >= seen.begin) & (key_CH < seen.end), value_CH, jnp.zeros_like(value_CH))

        plgpu.commit_smem()
        cleaned.meet()


def _finish(softmax: Softmax, sink) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp; the sink joins the sum, without a value (gpt-oss)."""
    values_QH, max_Q, sum_Q8 = softmax
    sum_Q = sum_Q8.sum(axis=1)
    seen_Q, factor_Q = sum_Q > 0, 1.0
    if sink is not None:
        with_sink_Q = jnp.maximum(max_Q, sink)
        factor_Q = jnp.exp2(max_Q - with_sink_Q)
        sum_Q = sum_Q * factor_Q + jnp.exp2(sink - with_sink_Q)
        max_Q = with_sink_Q
    factor_Q = jnp.where(seen_Q, factor_Q / sum_Q, 0.0)
    lse_Q = jnp.where(seen_Q, (max_Q + jnp.log2(sum_Q)) / LOG2E, -jnp.inf)
    return values_QH * lax.broadcast_in_dim(factor_Q, values_QH.shape, [0]), lse_Q


def _store(problem: Problem, smem, refs: Refs, warpgroup, tile: Tile, row, head, out_QH, lse_Q) -> None:
    """Writes the rows that are the sequence's own: all in one copy, or one by one next to another sequence."""
    rows, H = out_QH.shape
    out, lse = smem["out"].at[warpgroup], smem["lse"].at[warpgroup]
    own_all = (row >= tile.start) & (row + rows <= tile.end)
    first, end = jnp.clip(tile.start - row, 0, rows), jnp.clip(tile.end - row, 0, rows)
    row = pl.multiple_of(row + tile.part * refs.q.shape[0], ROW_ALIGNMENT)
    width = out.shape[1]
    # A row that TMA could not copy from where it lies is in no tiles, and copied as so many bytes.
    in_rows = width * out.dtype.itemsize % TMA_ALIGNMENT > 0 and not problem.config.interpretable
    for column in range(0, H, width):
        target = refs.out.at[:, pl.ds(head * H + column, width)]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        values = out_QH[:, column : column + width].astype(out.dtype)
        if in_rows:
            hopper.store_in_rows(values, out)
        else:
            out[...] = values
        if column == 0:
            lse[...] = lse_Q
        plgpu.commit_smem()

        @pl.when(own_all)
        def _(target=target):
            plgpu.copy_smem_to_gmem(out, target.at[pl.ds(row, rows)])

        @pl.when(~own_all)
        def _(target=target):
            @pl.loop(first, end)
            def _(i):
                plgpu.copy_smem_to_gmem(out.at[pl.ds(i, 1)], target.at[pl.ds(row + i, 1)])

    @pl.when(own_all)
    def _():
        plgpu.copy_smem_to_gmem(lse, refs.lse.at[head, pl.ds(row, rows)])

    @pl.when(~own_all)
    def _():
        @pl.loop(first, end)
        def _(i):
            refs.lse[head, row + i] = lse[i]

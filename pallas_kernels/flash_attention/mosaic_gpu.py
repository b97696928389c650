"""`flash_attention` on Hopper, in Mosaic GPU; README.md explains it.

A persistent block per multiprocessor has three warpgroups. One brings queries, keys and values to shared memory by
TMA. Two compute, each with its own query rows and both with the same keys: while one has the tensor cores, the other
does its softmax, and within each the softmax of one block of keys runs under the products of the block before
(FlashAttention-3, Shah et al. 2024, sections 3.1 and 3.2).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.blockwise import LOWEST, Options, PagedKV
from pallas_kernels.flash_attention import schedule
from pallas_kernels.flash_attention.config import CONSUMERS, Config, choose, scratch, unsupported
from pallas_kernels.flash_attention.schedule import ROW_ALIGNMENT, Blocks, Tile

PRODUCER = CONSUMERS  # the last warpgroup
# Registers of a thread: the 128 threads of every warpgroup share 65,536.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40
LOG2E = math.log2(math.e)
LAYOUT_QC, LAYOUT_Q = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)


# Jitted, so that the layers of a model share one trace.
@partial(jax.jit, static_argnames=("options", "config"))
def flash_attention(
    q_TNH: jax.Array,
    kv: PagedKV,
    table_RJ: jax.Array,
    cu_q_R1: jax.Array,
    lengths_R: jax.Array,
    sinks_N: jax.Array | None,
    options: Options,
    *,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See the public op; raises ValueError for what `unsupported` names. `config` is chosen unless given."""
    if reason := unsupported(q_TNH, kv, options):
        raise ValueError(f"implementation='mosaic_gpu' of flash_attention: {reason}")
    T, N, H = q_TNH.shape
    config = config or choose(H, kv.page_size, options)
    tiles, count = schedule.schedule(
        cu_q_R1, lengths_R, T, rows=config.tile_rows, block_kv=config.block_kv, window=options.window
    )
    q_TM = q_TNH.reshape(T, N * H)
    if T % ROW_ALIGNMENT:
        q_TM = jnp.pad(q_TM, ((0, -T % ROW_ALIGNMENT), (0, 0)))
    sinks = () if sinks_N is None else (sinks_N.astype(jnp.float32) * LOG2E,)
    out_TM, lse_NT = _launch(q_TM, kv, table_RJ, tiles, count, sinks, options, config, N)
    return out_TM[:T].reshape(T, N, H), lse_NT[:, :T].T


def _launch(q_TM, kv: PagedKV, table_RJ, tiles_I5, count_1, sinks, options, config, N) -> tuple[jax.Array, jax.Array]:
    T, M = q_TM.shape
    P, S, K, H = kv.k_PSKH.shape
    problem = Problem(N, K, H, S, options, config, bool(sinks))
    # One row per token, so that a copy is a box of some rows and one head's columns, whatever the size of the pages.
    pools = (pool_PSKH.reshape(P * S, K * H) for pool_PSKH in (kv.k_PSKH, kv.v_PSKH))
    blocks = config.blocks or _multiprocessors()
    run = plgpu.kernel(
        partial(_kernel, problem, blocks),
        out_type=(jax.ShapeDtypeStruct((T, M), q_TM.dtype), jax.ShapeDtypeStruct((N, T), jnp.float32)),
        scratch_types=scratch(config, H, S, jnp.dtype(q_TM.dtype)),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="flash_attention",
        # What a warpgroup writes to shared memory it reads only after a commit, which is a barrier.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )
    return run(q_TM, *pools, table_RJ, tiles_I5, count_1, *sinks)


def _multiprocessors() -> int:
    """Of the GPU at hand; of an H100 or H200 where a program is lowered without one."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else 132


@dataclass(frozen=True)
class Problem:
    """What is known when the kernel is traced."""

    query_heads: int
    kv_heads: int
    head_size: int
    page_size: int
    options: Options
    config: Config
    has_sinks: bool


class Softmax(NamedTuple):
    """A softmax under way: unnormalized values, maximum in units of log 2, sum."""

    values_QH: jax.Array
    max_Q: jax.Array
    sum_Q: jax.Array


@dataclass(frozen=True)
class Signal:
    """`senders` warpgroups each say that something is done; one warpgroup waits for all of them."""

    senders: int
    barrier: jax.Ref | int  # an int is the number of a named barrier

    def send(self, slot: int | jax.Array = 0) -> None:
        if isinstance(self.barrier, int):
            hopper.arrive(self.barrier + slot, (self.senders + 1) * hopper.WARPGROUP)
        else:
            plgpu.barrier_arrive(self.barrier.at[slot])

    def wait(self, slot: int | jax.Array = 0) -> None:
        if isinstance(self.barrier, int):
            hopper.wait(self.barrier + slot, (self.senders + 1) * hopper.WARPGROUP)
        else:
            plgpu.barrier_wait(self.barrier.at[slot])


class Signals(NamedTuple):
    turn: Signal  # to consumer i, in slot i: the tensor cores are yours
    cleaned: Signal  # to consumer i, in slot i: my half of the values is without NaN
    q_free: Signal  # to the producer: these queries, keys or values are no longer needed
    k_free: Signal
    v_free: Signal

    @classmethod
    def of(cls, config: Config, smem: dict) -> Signals:
        senders = (1, 1, CONSUMERS, CONSUMERS, CONSUMERS)
        if config.interpretable:
            return cls(*(Signal(n, smem[name]) for n, name in zip(senders, cls._fields, strict=True)))
        slots = (CONSUMERS, CONSUMERS, 1, config.stages, config.stages)
        first = (hopper.FIRST_BARRIER + sum(slots[:i]) for i in range(len(slots)))
        return cls(*map(Signal, senders, first))

    def of_memory(self, config: Config) -> list[tuple[Signal, int]]:
        """The signals that memory is free, each with the slots it has."""
        return [(self.q_free, 0), *itertools.product((self.k_free, self.v_free), range(config.stages))]


def _kernel(problem: Problem, blocks: int, q_ref, k_ref, v_ref, table_ref, tiles_ref, count_ref, *refs, **smem):
    sinks_ref = refs[0] if problem.has_sinks else None
    out_ref, lse_ref = refs[-2:]
    config, N = problem.config, problem.query_heads
    index, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    signals = Signals.of(config, smem)

    def for_each_item(work):
        """Calls work(tile, its blocks of keys, head, blocks of keys done before) for the items of this block."""

        def step(i, done):
            item = schedule.item(index, blocks, i)
            rank, head = lax.div(item, jnp.int32(N)), lax.rem(item, jnp.int32(N))
            tile = Tile(*(tiles_ref[rank, field] for field in range(len(Tile._fields))))
            keys = schedule.key_blocks(tile, config.tile_rows, config.block_kv, problem.options.window)
            work(tile, keys, head, done)
            return done + keys.total

        lax.fori_loop(0, schedule.share(index, blocks, count_ref[0] * N), step, jnp.int32(0))

    @pl.when(warpgroup == PRODUCER)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        for_each_item(partial(_load, problem, q_ref, (k_ref, v_ref), table_ref, smem, signals))
        for signal, slot in signals.of_memory(config):  # no consumer is left behind
            signal.wait(slot)

    @pl.when(warpgroup != PRODUCER)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        for signal, slot in signals.of_memory(config):  # all of it is free at the start
            signal.send(slot)
        pl.when(warpgroup == 1)(lambda: signals.turn.send(0))
        for_each_item(partial(_compute, problem, warpgroup, smem, signals, sinks_ref, out_ref, lse_ref))
        pl.when(warpgroup == 0)(lambda: signals.turn.wait(0))
        plgpu.wait_smem_to_gmem(0)


def _load(problem: Problem, q_ref, kv_refs, table_ref, smem, signals: Signals, tile: Tile, keys: Blocks, head, done):
    """The producer's part of an item: the queries, then block after block of keys and values."""
    config, H, S = problem.config, problem.head_size, problem.page_size
    kv_columns = pl.ds(lax.div(head, jnp.int32(problem.query_heads // problem.kv_heads)) * H, H)
    rows = min(config.block_kv, S)
    seen = schedule.keys_in_sight(tile, problem.options.window)
    first_column, last_column = (lax.div(key, jnp.int32(S)) for key in (seen.begin, jnp.maximum(seen.end, 1) - 1))

    signals.q_free.wait()
    q_rows = pl.ds(pl.multiple_of(tile.row, ROW_ALIGNMENT), config.tile_rows)
    plgpu.copy_gmem_to_smem(q_ref.at[q_rows, pl.ds(head * H, H)], smem["q"], smem["q_full"])

    def load_block(i, _):
        slot = lax.rem(done + i, jnp.int32(config.stages))
        starts = []
        for copy in range(config.copies(S)):
            key = keys.nth(i) * config.block_kv + copy * rows
            # A page that no query sees is not read: one that is seen stands in, and the keys are masked.
            column = jnp.clip(lax.div(key, jnp.int32(S)), first_column, last_column)
            start = table_ref[tile.sequence, column] * S + lax.rem(key, jnp.int32(S))
            starts.append(pl.multiple_of(start, ROW_ALIGNMENT))
        for name, ref, free in zip("kv", kv_refs, (signals.k_free, signals.v_free), strict=True):
            free.wait(slot)
            for copy, start in enumerate(starts):
                target = smem[name].at[slot, pl.ds(copy * rows, rows)]
                plgpu.copy_gmem_to_smem(ref.at[pl.ds(start, rows), kv_columns], target, smem[f"{name}_full"].at[slot])

    lax.fori_loop(0, keys.total, load_block, None)


def _compute(
    problem: Problem, warpgroup, smem, signals: Signals, sinks_ref, out_ref, lse_ref,
    tile: Tile, keys: Blocks, head, done,
):  # fmt: skip
    """A consumer's part of an item."""
    config = problem.config
    row = pl.multiple_of(tile.row + warpgroup * config.block_q, ROW_ALIGNMENT)
    start = Softmax(
        plgpu.layout_cast(jnp.zeros((config.block_q, problem.head_size), jnp.float32), LAYOUT_QC),
        plgpu.layout_cast(jnp.full((config.block_q,), LOWEST, jnp.float32), LAYOUT_Q),
        plgpu.layout_cast(jnp.zeros((config.block_q,), jnp.float32), LAYOUT_Q),
    )

    def nothing_seen():
        signals.q_free.send()
        return start

    plgpu.barrier_wait(smem["q_full"])
    attend = partial(_attend, problem, warpgroup, smem, signals, tile, keys, row + tile.shift, done, start)
    softmax = lax.cond(keys.total > 0, attend, nothing_seen)
    out_QH, lse_Q = _finish(softmax, None if sinks_ref is None else sinks_ref[head])
    _store(warpgroup, smem, out_ref, lse_ref, tile, row, head, out_QH, lse_Q)


def _attend(problem, warpgroup, smem, signals, tile, keys: Blocks, position, done, start: Softmax) -> Softmax:
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

    def softmax_of(i, masked):
        return partial(_row_softmax, problem, position - keys.nth(i) * config.block_kv, masked)

    def first():
        scores_QC = products.scores(await_keys(0), pass_turn)
        signals.k_free.send(slot_of(0))
        max_Q, sum_Q, _, p_QC = softmax_of(0, True)(scores_QC, start.max_Q, start.sum_Q)
        await_values(0, True)
        return Softmax(start.values_QH, max_Q, sum_Q), p_QC.astype(q.dtype)

    def step(masked, i, carry):
        softmax, p_QC = carry
        k, v = await_keys(i), smem["v"].at[slot_of(i - 1)]
        free_keys = partial(signals.k_free.send, slot_of(i))
        softmax, p_QC = products.both(softmax, p_QC, k, v, pass_turn, free_keys, softmax_of(i, masked))
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

    def both(self, softmax: Softmax, p_QC, k, v, issued, scored, row_softmax) -> tuple[Softmax, jax.Array]:
        """Issues the scores of the next keys and the values of these; does the next softmax under the latter."""
        if self.p is not None:
            scores_QC = self.scores(k, issued)
            scored()
            max_Q, sum_Q, decay_Q, new_p_QC = row_softmax(scores_QC, softmax.max_Q, softmax.sum_Q)
            values_QH = self.values(softmax.values_QH, p_QC, v)
        else:
            values_QH, max_Q, sum_Q, decay_Q, new_p_QC = self._overlapped(
                softmax, p_QC, k, v, issued, scored, row_softmax
            )
        values_QH = values_QH * lax.broadcast_in_dim(decay_Q, values_QH.shape, [0])
        return Softmax(values_QH, max_Q, sum_Q), new_p_QC.astype(p_QC.dtype)

    def _overlapped(self, softmax: Softmax, p_QC, k, v, issued, scored, row_softmax) -> Any:
        def body(refs):
            values_ref, *result_refs = refs

            def issue(scores_ref):
                plgpu.wgmma(scores_ref, self.q, k.transpose((1, 0)))
                plgpu.wgmma(values_ref, p_QC, v)
                issued()
                return plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)

            scores_QC = pl.run_scoped(issue, plgpu.WGMMAAccumulatorRef(p_QC.shape, jnp.float32))
            scored()
            results = row_softmax(scores_QC, softmax.max_Q, softmax.sum_Q)
            hopper.complete(results[1])
            for ref, result in zip(result_refs, results, strict=True):
                ref[...] = result

        # run_state returns what its references hold at the end, when it has waited for the values.
        no_p_QC = plgpu.layout_cast(jnp.zeros(p_QC.shape, jnp.float32), LAYOUT_QC)
        placeholders = (softmax.max_Q, softmax.sum_Q, softmax.sum_Q, no_p_QC)
        return pl.run_state(body)((plgpu.WGMMAAccumulatorRef.init(softmax.values_QH), *placeholders))


def _row_softmax(problem: Problem, distance, masked: bool, scores_QC, max_Q, sum_Q):
    """Takes a block into the softmax: new maximum and sum, the decay of what came before, the block's weights.

    `distance` is the first row's position less the first key's. A row that has seen nothing keeps the maximum
    LOWEST, against which a masked score weighs exactly 0.
    """
    options = problem.options
    scale = options.scale * LOG2E
    if options.soft_cap is not None:
        scores_QC = jnp.tanh(scores_QC * (options.scale / options.soft_cap))
        scale = options.soft_cap * LOG2E
    if masked:
        key_QC = plgpu.broadcasted_iota(jnp.int32, scores_QC.shape, 1, layout=LAYOUT_QC)
        last_Q = plgpu.broadcasted_iota(jnp.int32, max_Q.shape, 0, layout=LAYOUT_Q) + distance
        visible_QC = key_QC <= lax.broadcast_in_dim(last_Q, scores_QC.shape, [0])
        if options.window is not None:
            visible_QC &= key_QC > lax.broadcast_in_dim(last_Q - options.window, scores_QC.shape, [0])
        scores_QC = jnp.where(visible_QC, scores_QC, -jnp.inf)
    new_max_Q = jnp.maximum(max_Q, scores_QC.max(axis=1) * scale)
    decay_Q = jnp.exp2(max_Q - new_max_Q)
    p_QC = jnp.exp2(scores_QC * scale - lax.broadcast_in_dim(new_max_Q, scores_QC.shape, [0]))
    return new_max_Q, sum_Q * decay_Q + p_QC.sum(axis=1), decay_Q, p_QC


def _clean(problem: Problem, warpgroup, v, cleaned: Signal, tile: Tile, block):
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
        cleaned.send(1 - warpgroup)
        cleaned.wait(warpgroup)


def _finish(softmax: Softmax, sink) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp; the sink joins the sum, without a value (gpt-oss)."""
    values_QH, max_Q, sum_Q = softmax
    seen_Q, factor_Q = sum_Q > 0, 1.0
    if sink is not None:
        with_sink_Q = jnp.maximum(max_Q, sink)
        factor_Q = jnp.exp2(max_Q - with_sink_Q)
        sum_Q = sum_Q * factor_Q + jnp.exp2(sink - with_sink_Q)
        max_Q = with_sink_Q
    factor_Q = jnp.where(seen_Q, factor_Q / sum_Q, 0.0)
    lse_Q = jnp.where(seen_Q, (max_Q + jnp.log2(sum_Q)) / LOG2E, -jnp.inf)
    return values_QH * lax.broadcast_in_dim(factor_Q, values_QH.shape, [0]), lse_Q


def _store(warpgroup, smem, out_ref, lse_ref, tile: Tile, row, head, out_QH, lse_Q):
    """Writes the rows that are the sequence's own: all in one copy, or one by one next to another sequence."""
    rows, H = out_QH.shape
    out, lse = smem["out"].at[warpgroup], smem["lse"].at[warpgroup]
    own_all = (row >= tile.start) & (row + rows <= tile.end)
    first, end = jnp.clip(tile.start - row, 0, rows), jnp.clip(tile.end - row, 0, rows)
    width = out.shape[1]
    for column in range(0, H, width):
        target = out_ref.at[:, pl.ds(head * H + column, width)]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out[...] = out_QH[:, column : column + width].astype(out.dtype)
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
        plgpu.copy_smem_to_gmem(lse, lse_ref.at[head, pl.ds(row, rows)])

    @pl.when(~own_all)
    def _():
        @pl.loop(first, end)
        def _(i):
            lse_ref[head, row + i] = lse[i]

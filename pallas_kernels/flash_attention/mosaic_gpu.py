"""`flash_attention` on Hopper, in Mosaic GPU; README.md explains it.

A persistent block per multiprocessor has three warpgroups. One, the producer, brings queries, keys and values to
shared memory by TMA. Two, the consumers, compute, each on its own query rows and both with the same keys: while one
has the tensor cores the other does its softmax, and within each the softmax of one block of keys runs under the
products of the block before (FlashAttention-3, Shah et al. 2024, sections 3.1 and 3.2).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.blockwise import LOG2E, Options, PagedKV, share
from pallas_kernels.flash_attention import consumer, producer, schedule
from pallas_kernels.flash_attention.config import CONSUMERS, Config, choose, for_few_queries, result_dtype, scratch
from pallas_kernels.flash_attention.schedule import ROW_ALIGNMENT, Tile
from pallas_kernels.flash_attention.shared import Items, Problem, Refs, Signals
from pallas_kernels.lowered import once

PRODUCER = CONSUMERS  # the last warpgroup


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
    """See the public op; `config.unsupported` says what this one does not take. `config` is chosen unless given."""
    T, N, H = q_TNH.shape
    if config is None:
        keys = table_RJ.shape[1] * kv.page_size
        config = for_few_queries(choose(q_TNH, kv), q_TNH, keys, dispatch.multiprocessors())
    tiles_I6, count_1 = schedule.schedule(
        cu_q_R1, lengths_R, T, rows=config.tile_rows, block_kv=config.block_kv, window=options.window,
        splits=config.splits,
    )  # fmt: skip
    q_TM = q_TNH.reshape(T, N * H)
    if T % ROW_ALIGNMENT:
        q_TM = jnp.pad(q_TM, ((0, -T % ROW_ALIGNMENT), (0, 0)))
    whole = config.splits == 1
    out_UM, lse_NU = _launch(q_TM, kv, table_RJ, tiles_I6, count_1, sinks_N if whole else None, options, config, N)
    if whole:
        return out_UM[:T].reshape(T, N, H), lse_NU[:, :T].T
    out_STNH = out_UM.reshape(config.splits, -1, N, H)[:, :T]
    lse_STN = lse_NU.reshape(N, config.splits, -1).transpose(1, 2, 0)[:, :T]
    return _merged(out_STNH, lse_STN, sinks_N, q_TNH.dtype)


def _merged(out_STNH, lse_STN, sinks_N, dtype) -> tuple[jax.Array, jax.Array]:
    """Of the parts of the keys, each weighted by its sum of exponentials (Flash-Decoding, Dao et al. 2023)."""
    lse_TN = whole_TN = jax.nn.logsumexp(lse_STN, axis=0)
    if sinks_N is not None:
        whole_TN = jnp.logaddexp(lse_TN, sinks_N.astype(jnp.float32)[None])
    out_TNH = jnp.sum(out_STNH * share(lse_STN, whole_TN[None])[..., None], axis=0)
    return out_TNH.astype(dtype), jnp.where(lse_TN > -jnp.inf, whole_TN, -jnp.inf)


def _launch(q_TM, kv: PagedKV, table_RJ, tiles_I6, count_1, sinks_N, options, config, N):
    """Rows of the results: those of the first part of the keys, of the second, and so on."""
    T, M = q_TM.shape
    U = config.splits * T
    P, S, K, H = kv.k_PSKH.shape
    problem = Problem(N, K, H, S, kv.k_scales_PKS is not None, options, config)
    blocks = config.blocks or dispatch.multiprocessors()
    run = plgpu.kernel(
        partial(_kernel, problem, blocks),
        out_type=(
            jax.ShapeDtypeStruct((U, M), result_dtype(config, q_TM.dtype)),
            jax.ShapeDtypeStruct((N, U), jnp.float32),
        ),
        scratch_types=scratch(config, H, S, q_TM.dtype, kv.k_PSKH.dtype),
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
    # One row per token: a copy is then some rows and the columns of one head, whatever the size of the pages.
    k, v = (pool_PSKH.reshape(P * S, K * H) for pool_PSKH in (kv.k_PSKH, kv.v_PSKH))
    scales = (x if x is None else x.reshape(-1) for x in (kv.k_scales_PKS, kv.v_scales_PKS))
    sinks_N = None if sinks_N is None else sinks_N.astype(jnp.float32) * LOG2E
    arrays = q_TM, k, v, *scales, table_RJ, tiles_I6, count_1, jnp.zeros((1,), jnp.int32), sinks_N
    return once(run, ("flash_attention", problem, blocks), *arrays)


def _kernel(problem: Problem, blocks: int, *refs, **smem):
    refs = Refs(*refs)
    config, warpgroup = problem.config, lax.axis_index("warpgroup")
    signals = Signals.of(config, smem)
    tiles = refs.tile_count[0]
    at_once = schedule.heads_at_once(tiles, problem.query_heads, problem.kv_heads, blocks)
    counted = refs.next_item, smem["lse"].at[CONSUMERS], smem["items_full"]
    items = Items(lax.axis_index("block"), blocks, tiles * problem.query_heads, *counted, config.interpretable)

    def for_each_item(work, number):
        """Calls work(tile, its blocks of keys, head, blocks of keys done before) for the items of this block, of which
        `number` gives the nth."""

        def step(carry):
            item, nth, done = carry
            rank, head = schedule.rank_and_head(item, tiles, at_once)
            tile = Tile(*(refs.tiles[rank, field] for field in range(len(Tile._fields))))
            keys = schedule.key_blocks(tile, config.tile_rows, config.block_kv, problem.options.window, config.splits)
            work(tile, keys, head, done)
            return number(nth + 1), nth + 1, done + keys.total

        lax.while_loop(lambda carry: carry[0] < items.total, step, (items.block, jnp.int32(0), jnp.int32(0)))

    @pl.when(warpgroup == PRODUCER)
    def _():
        plgpu.set_max_registers(problem.producer_registers, action="decrease")
        load = producer.load_quantized if problem.quantized else producer.load
        for_each_item(partial(load, problem, refs, smem, signals), items.take)
        for signal, slot in signals.of_memory(config):  # no consumer is left behind
            signal.wait(slot)

    @pl.when(warpgroup != PRODUCER)
    def _():
        plgpu.set_max_registers(problem.consumer_registers, action="increase")
        for signal, slot in signals.of_memory(config):  # all of it is free at the start
            signal.send(slot)
        pl.when(warpgroup == 1)(lambda: signals.turn.send(0))
        for_each_item(partial(consumer.compute, problem, refs, smem, signals, warpgroup), items.read)
        pl.when(warpgroup == 0)(lambda: signals.turn.wait(0))
        plgpu.wait_smem_to_gmem(0)

"""The warpgroup of the prefill kernel that brings queries, keys and values to shared memory by TMA."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import schedule
from pallas_kernels.flash_attention.schedule import ROW_ALIGNMENT, Blocks, Tile
from pallas_kernels.flash_attention.shared import Problem, Refs, Signals


def load(problem: Problem, refs: Refs, smem: dict, signals: Signals, tile: Tile, keys: Blocks, head, done) -> None:
    """Brings the queries of an item, then block after block of its keys and values."""
    _load_queries(problem, refs, smem, signals, tile, head)

    @pl.loop(0, keys.total)
    def _(i):
        slot = lax.rem(done + i, jnp.int32(problem.config.stages))
        starts = _rows_of_block(problem, refs, tile, keys.nth(i))
        for name, free in (("k", signals.k_free), ("v", signals.v_free)):
            free.wait(slot)
            ref = getattr(refs, name)
            _copy_rows(problem, ref, head, starts, smem[name].at[slot], smem[f"{name}_full"].at[slot])


def load_quantized(problem, refs: Refs, smem, signals: Signals, tile: Tile, keys: Blocks, head, done) -> None:
    """The same for pages of 8 bits: they land in memory of their own, and this warpgroup converts them.

    Where that memory holds two blocks, one is on its way while the other is converted. The scales go to the
    consumers, who multiply float32 scores and weights with them.
    """
    config, raw_blocks = problem.config, smem["raw"].shape[0]
    free = {"k": signals.k_free, "v": signals.v_free}

    def raw_slot(name):
        return "kv".index(name) % raw_blocks

    def fetch(i, name):
        starts = _rows_of_block(problem, refs, tile, keys.nth(i))
        slot = raw_slot(name)
        _copy_rows(problem, getattr(refs, name), head, starts, smem["raw"].at[slot], smem["raw_full"].at[slot])

    def convert(name, slot):
        plgpu.barrier_wait(smem["raw_full"].at[raw_slot(name)])
        free[name].wait(slot)
        _convert(smem["raw"].at[raw_slot(name)], smem[name].at[slot])
        plgpu.commit_smem()
        plgpu.barrier_arrive(smem[f"{name}_full"].at[slot])

    if raw_blocks > 1:
        pl.when(keys.total > 0)(lambda: fetch(0, "k"))
    _load_queries(problem, refs, smem, signals, tile, head)

    @pl.loop(0, keys.total)
    def _(i):
        slot = lax.rem(done + i, jnp.int32(config.stages))
        if raw_blocks == 1:
            fetch(i, "k")
        else:
            fetch(i, "v")
        convert("k", slot)
        _copy_scales(problem, refs, smem, head, _rows_of_block(problem, refs, tile, keys.nth(i)), slot)
        if raw_blocks == 1:
            fetch(i, "v")
        else:
            pl.when(i + 1 < keys.total)(lambda: fetch(i + 1, "k"))
        convert("v", slot)


def _copy_scales(problem: Problem, refs: Refs, smem, head, starts: list[jax.Array], slot) -> None:
    """Those of keys and of values; they arrive with the keys, whose place in memory is free by now."""
    S, rows = problem.page_size, min(problem.config.block_kv, problem.page_size)
    assert refs.k_scales is not None
    assert refs.v_scales is not None
    for copy, start in enumerate(starts):
        page = lax.div(start, jnp.int32(S))
        first = (page * problem.kv_heads + _kv_head(problem, head)) * S + lax.rem(start, jnp.int32(S))
        scales, target = pl.ds(pl.multiple_of(first, rows), rows), pl.ds(copy * rows, rows)
        for kind, ref in enumerate((refs.k_scales, refs.v_scales)):
            # In bounds, it is a copy of bytes in a row, which need no more than 16 of them for alignment.
            plgpu.copy_gmem_to_smem(
                ref.at[scales], smem["scales"].at[kind, slot, target], smem["k_full"].at[slot],
                oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
            )  # fmt: skip


def _load_queries(problem: Problem, refs: Refs, smem, signals: Signals, tile: Tile, head) -> None:
    rows = pl.ds(pl.multiple_of(tile.row, ROW_ALIGNMENT), problem.config.tile_rows)
    columns = pl.ds(head * problem.head_size, problem.head_size)
    signals.q_free.wait()
    plgpu.copy_gmem_to_smem(refs.q.at[rows, columns], smem["q"], smem["q_full"])


def _kv_head(problem: Problem, head) -> jax.Array:
    return lax.div(head, jnp.int32(problem.query_heads // problem.kv_heads))


def _rows_of_block(problem: Problem, refs: Refs, tile: Tile, block) -> list[jax.Array]:
    """The first row of each of the copies that make up a block of keys."""
    config, S = problem.config, problem.page_size
    seen = schedule.keys_in_sight(tile, problem.options.window)
    first_column, last_column = (lax.div(key, jnp.int32(S)) for key in (seen.begin, jnp.maximum(seen.end, 1) - 1))
    starts = []
    for copy in range(config.copies(S)):
        key = block * config.block_kv + copy * min(config.block_kv, S)
        # A page that no query sees is not read: one that is seen stands in, and the keys are masked.
        column = jnp.clip(lax.div(key, jnp.int32(S)), first_column, last_column)
        start = refs.table[tile.sequence, column] * S + lax.rem(key, jnp.int32(S))
        starts.append(pl.multiple_of(start, ROW_ALIGNMENT))
    return starts


def _copy_rows(problem: Problem, ref, head, starts: list[jax.Array], target, full) -> None:
    rows = min(problem.config.block_kv, problem.page_size)
    columns = pl.ds(_kv_head(problem, head) * problem.head_size, problem.head_size)
    for copy, start in enumerate(starts):
        plgpu.copy_gmem_to_smem(ref.at[pl.ds(start, rows), columns], target.at[pl.ds(copy * rows, rows)], full)


def _convert(raw, target) -> None:
    """From 8 bits to 16, exactly, a part at a time for want of registers."""
    rows, columns = 64, 64 if target.shape[1] % 64 == 0 else 32
    for row, column in itertools.product(range(0, target.shape[0], rows), range(0, target.shape[1], columns)):
        part = pl.ds(row, rows), pl.ds(column, columns)
        x_CH = plgpu.load(raw.at[part], layout=plgpu.Layout.WGMMA_UPCAST_2X)
        if x_CH.dtype == jnp.int8:
            x_CH = x_CH.astype(jnp.bfloat16)
        if x_CH.dtype != target.dtype:
            x_CH = x_CH.astype(jnp.float32).astype(target.dtype)
        target[part] = x_CH

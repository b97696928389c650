"""`tiled_matmul` for Hopper: tiles of the result stay in registers until they are gated or have their residual.

A persistent block for every multiprocessor has three warpgroups. One, the producer, brings tiles of x and of the
weight to shared memory by TMA, and goes on to the next tile of the result while the others finish one. Two, the
consumers, multiply, each its own 64 tokens by the same columns. Blocks of a cluster have the same columns too: each
reads a part of the weight's tile and sends it to both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.lowered import once
from pallas_kernels.streaming_matmul import xla
from pallas_kernels.streaming_matmul.arguments import Arguments
from pallas_kernels.streaming_matmul.mosaic_gpu import OPERAND
from pallas_kernels.tiled_matmul.config import (
    CONSUMERS,
    PIECE,
    ROWS,
    SLOTS,
    TILE_D,
    TILE_ROWS,
    Config,
    Shape,
    config_for,
)

PRODUCER = CONSUMERS  # the last warpgroup
WGMMA = plgpu.Layout.WGMMA


@partial(jax.jit, static_argnames=("config", "blocks"))
def tiled_matmul(arguments: Arguments, *, config: Config | None = None, blocks: int | None = None) -> jax.Array:
    """See the public op; `config.unsupported` says what this one does not take. Both are chosen unless given."""
    M, blocks = arguments.tokens, blocks or dispatch.multiprocessors()
    if M % 8 == 0:
        return _product(config, blocks, arguments)
    y_MN: jax.Array = _product(config, blocks, arguments.padded(-M % 8))  # copies take whole groups of 8 tokens
    return y_MN[:M]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _product(config: Config | None, blocks: int, arguments: Arguments) -> jax.Array:
    shape = Shape.of(arguments)
    config = config or config_for(shape, blocks)
    config.check(shape)
    return _launch(Problem(shape, config, blocks), arguments.x, arguments.w, arguments.residual_MN)


@_product.defjvp
def _derivative(
    config: Config | None, blocks: int, primals: tuple[Arguments], tangents: tuple[Arguments]
) -> tuple[Any, Any]:
    """That of the same function in plain XLA."""
    (arguments,) = primals
    _, tangent = jax.jvp(xla.streaming_matmul, primals, tangents)
    return _product(config, blocks, arguments), tangent


@dataclass(frozen=True)
class Problem:
    shape: Shape
    config: Config
    blocks: int

    @property
    def steps(self) -> int:
        """Of a tile of the result."""
        return self.shape.hidden // TILE_D

    @property
    def clusters(self) -> int:
        return min(self.blocks // self.config.cluster, self.config.tiles(self.shape))

    @property
    def pieces(self) -> int:
        """Of a consumer's part of a tile."""
        return self.config.width(self.shape) // PIECE

    @property
    def slots(self) -> int:
        """For pieces on their way."""
        return min(SLOTS, self.pieces)

    def place(self, tile: jax.Array, part: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first row and column of the result that block `part` of a cluster has of this tile."""
        config, rows = self.config, self.config.rows(self.shape)
        columns = self.shape.outputs // config.width(self.shape)
        band, within = (f(tile, jnp.int32(config.band * columns)) for f in (lax.div, lax.rem))
        height = jnp.minimum(rows - band * config.band, config.band)
        row = band * config.band + lax.rem(within, height)
        return (row * config.cluster + part) * TILE_ROWS, lax.div(within, height) * config.width(self.shape)


def _launch(problem: Problem, x_MD: jax.Array, w: jax.Array, residual_MN: jax.Array | None) -> jax.Array:
    shape, config = problem.shape, problem.config
    names = ["x", "w", *(["residual"] if shape.residual else []), "out", *(memory := _memory(problem))]
    call = plgpu.kernel(
        lambda *refs: _body(problem, SimpleNamespace(**dict(zip(names, refs, strict=True)))),
        out_type=jax.ShapeDtypeStruct((shape.tokens, shape.outputs), shape.dtype),
        grid=(problem.clusters,),
        grid_names=("cluster",),
        cluster=(config.cluster,),
        cluster_names=("part",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=tuple(memory.values()),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="tiled_matmul",
    )
    arrays = (x_MD, w) if residual_MN is None else (x_MD, w, residual_MN)
    return once(call, ("tiled_matmul", problem), *arrays)[0]


def _memory(problem: Problem) -> dict[str, Any]:
    """Buffers and barriers, by name."""
    shape, config = problem.shape, problem.config
    # What one block sends to another lands where the consumers of both are done.
    free = plgpu.Barrier if config.cluster == 1 else partial(plgpu.ClusterBarrier, collective_axes=("part",))
    buffers = config.buffers(shape).items()
    found: dict[str, Any] = {name: plgpu.SMEM(buffer, shape.dtype, transforms=OPERAND) for name, buffer in buffers}
    found |= {
        "loaded": plgpu.Barrier(num_arrivals=1 + shape.halves, num_barriers=config.stages),
        "free": free(num_barriers=config.stages, num_arrivals=CONSUMERS),
    }
    if shape.residual:
        found["residual_loaded"] = plgpu.Barrier(num_barriers=(CONSUMERS, SLOTS))
    return found


def _body(problem: Problem, refs: SimpleNamespace) -> None:
    warpgroup, part = lax.axis_index("warpgroup"), lax.axis_index("part")

    def for_each_tile(work: Callable[[jax.Array, jax.Array, jax.Array], None]) -> None:
        """Calls work(row, column, steps done before) for the tiles of this block."""

        def next_(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            tile, done = carry
            work(*problem.place(tile, part), done)
            return tile + problem.clusters, done + problem.steps

        tiles = problem.config.tiles(problem.shape)
        lax.while_loop(lambda carry: carry[0] < tiles, next_, (lax.axis_index("cluster"), jnp.int32(0)))

    @pl.when(warpgroup == PRODUCER)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        for_each_tile(partial(_load, problem, refs))
        for slot in range(problem.config.stages):  # nobody leaves while another block may arrive here
            plgpu.barrier_wait(refs.free.at[slot])

    @pl.when(warpgroup != PRODUCER)
    def _():
        plgpu.set_max_registers(232, action="increase")
        for slot in range(problem.config.stages):  # all of the ring is free at the start
            plgpu.barrier_arrive(refs.free.at[slot])
        for_each_tile(partial(_compute, problem, refs, warpgroup))
        plgpu.wait_smem_to_gmem(0)


def _load(problem: Problem, refs: SimpleNamespace, row: jax.Array, column: jax.Array, done: jax.Array) -> None:
    """Brings x and the weight for one tile of the result."""
    shape, config = problem.shape, problem.config
    width = config.width(shape)
    to_all = "part" if config.cluster > 1 else None

    @pl.loop(0, problem.steps)
    def _(step):
        slot = lax.rem(done + step, jnp.int32(config.stages))
        d, loaded = pl.ds(pl.multiple_of(step * TILE_D, TILE_D), TILE_D), refs.loaded.at[slot]
        plgpu.barrier_wait(refs.free.at[slot])
        for half in range(shape.halves):
            index = (d, half, pl.ds(column, width)) if shape.gated else (d, pl.ds(column, width))
            plgpu.copy_gmem_to_smem(refs.w.at[index], refs.w_ring.at[slot, half], loaded, collective_axes=to_all)
        plgpu.copy_gmem_to_smem(refs.x.at[pl.ds(row, TILE_ROWS), d], refs.x_ring.at[slot], loaded)


def _compute(
    problem: Problem, refs: SimpleNamespace, warpgroup: jax.Array, row: jax.Array, column: jax.Array, done: jax.Array
) -> None:
    """A consumer's tokens of one tile of the result."""
    row += warpgroup * ROWS
    if problem.shape.residual:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
        for piece in range(problem.slots):
            _load_residual(refs, warpgroup, row, column, piece)
    accumulator = plgpu.WGMMAAccumulatorRef((ROWS, problem.config.width(problem.shape)), jnp.float32)
    halves = pl.run_scoped(partial(_multiply, problem, refs, warpgroup, done), *[accumulator] * problem.shape.halves)
    _finish(problem, refs, warpgroup, row, column, halves)


def _multiply(
    problem: Problem, refs: SimpleNamespace, warpgroup: jax.Array, done: jax.Array, *products: Any
) -> list[jax.Array]:
    """x times each half of the weight's tile."""
    stages = jnp.int32(problem.config.stages)

    def give_back(step: jax.Array | int) -> None:
        plgpu.barrier_arrive(refs.free.at[lax.rem(done + step, stages)])

    @pl.loop(0, problem.steps)
    def _(step):
        slot = lax.rem(done + step, stages)
        plgpu.barrier_wait(refs.loaded.at[slot])
        for half, product in enumerate(products):
            plgpu.wgmma(product, refs.x_ring.at[slot, pl.ds(warpgroup * ROWS, ROWS)], refs.w_ring.at[slot, half])
        plgpu.wgmma_wait(len(products))  # this step runs on; the one before it is done
        pl.when(step > 0)(lambda: give_back(step - 1))

    plgpu.wgmma_wait(0)
    give_back(problem.steps - 1)
    return [product[...] for product in products]


def _finish(
    problem: Problem, refs: SimpleNamespace, warpgroup: jax.Array, row: jax.Array, column: jax.Array,
    halves: list[jax.Array],
) -> None:  # fmt: skip
    """The gate and the residual, in float32; then the one rounding, and the result piece by piece on its way."""
    for piece in range(problem.pieces):
        y, *up = (half[:, piece * PIECE : (piece + 1) * PIECE] for half in halves)
        if up:
            y = y * lax.logistic(y) * up[0]
        slot = refs.pieces.at[warpgroup, piece % SLOTS]
        if problem.shape.residual:
            plgpu.barrier_wait(refs.residual_loaded.at[warpgroup, piece % SLOTS])
            y += plgpu.load(slot, layout=WGMMA, optimized=False).astype(jnp.float32)
        else:
            plgpu.wait_smem_to_gmem(problem.slots - 1, wait_read_only=True)
        slot[...] = y.astype(problem.shape.dtype)
        plgpu.commit_smem()
        # Rows past the last token are dropped.
        plgpu.copy_smem_to_gmem(slot, refs.out.at[_of_piece(row, column, piece)])
        if problem.shape.residual and piece + SLOTS < problem.pieces:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            _load_residual(refs, warpgroup, row, column, piece + SLOTS)


def _load_residual(refs: SimpleNamespace, warpgroup: jax.Array, row: jax.Array, column: jax.Array, piece: int) -> None:
    place = warpgroup, piece % SLOTS
    source = refs.residual.at[_of_piece(row, column, piece)]
    plgpu.copy_gmem_to_smem(source, refs.pieces.at[place], refs.residual_loaded.at[place])


def _of_piece(row: jax.Array, column: jax.Array, piece: int) -> tuple[pl.Slice, pl.Slice]:
    return pl.ds(row, ROWS), pl.ds(column + piece * PIECE, PIECE)

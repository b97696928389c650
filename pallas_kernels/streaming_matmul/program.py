"""The device program of `streaming_matmul`: what a block of threads does, for one product or several in a row.

A block streams tiles of the weight through a ring of buffers and does not pause between its tiles of columns. Nor does
it between products of which each reads the result of the one before: while the blocks of the launch wait for each
other, the first tiles of the next weight are on their way, which need not wait.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.streaming_matmul.config import ROWS, Config, Shape
from pallas_kernels.streaming_matmul.weights import Ref, Tiles

WGMMA = plgpu.Layout.WGMMA
BY_COLUMN = WGMMA.reduce(1)


class Work(NamedTuple):
    """What a block multiplies in one round: a tile of columns, for one group of tokens."""

    exists: jax.Array | bool
    group: jax.Array | int
    tile: jax.Array
    expert: jax.Array | None


@dataclass(frozen=True)
class Block:
    """A block of threads at work on a product: its problem, and its view of device and shared memory.

    A team, of the `split` blocks that share columns, takes the tiles of columns that follow its number, in as many
    rounds as it needs. It is a cluster, or in a launch of several products a single block of one.

    Attributes:
        clusters, blocks: of the launch.
    """

    shape: Shape
    config: Config
    norm_eps: float
    clusters: int
    blocks: int
    gmem: SimpleNamespace
    smem: SimpleNamespace

    @property
    def tiles(self) -> Tiles:
        return Tiles.of(self.shape.w_axes, self.config)

    @property
    def owned_tokens(self) -> int:
        return self.shape.padded_tokens // self.config.owners(self.shape)

    @property
    def steps(self) -> int:
        return self.config.steps(self.shape)

    @property
    def items(self) -> int:
        """Tiles of columns of all groups."""
        return self.shape.groups * self.config.tiles(self.shape)

    @property
    def teams(self) -> int:
        return self.blocks // self.config.split

    @property
    def team(self) -> jax.Array:
        cluster = lax.axis_index("cluster")
        if self.teams == self.clusters:
            return cluster
        return cluster * (self.blocks // self.clusters) + lax.axis_index("part")

    @property
    def rounds(self) -> int:
        return math.ceil(self.items / self.teams)

    @property
    def reuses_inbox(self) -> bool:
        """Whether partial sums come to the same place more than once in this launch."""
        return hasattr(self.smem, "inbox_free")

    @property
    def part(self) -> jax.Array:
        """Which part of D; the blocks with the lowest numbers also own tokens of the result."""
        return lax.axis_index("part") if self.config.split > 1 else lax.axis_index("part") * 0

    def work(self, round_: jax.Array | int) -> Work:
        """In a round, neighbouring blocks have neighbouring columns."""
        tiles = self.config.tiles(self.shape)
        item = self.team + round_ * self.teams
        exists = True if self.items == self.teams else item < self.items
        group, tile = (0, item) if self.shape.groups == 1 else (lax.div(item, tiles), lax.rem(item, tiles))
        if self.gmem.expert is None:
            return Work(exists, group, tile, None)
        return Work(exists, group, tile, self.gmem.expert[lax.min(group, self.shape.groups - 1)])

    def result(self, work: Work) -> tuple[jax.Array | int, pl.Slice, pl.Slice]:
        """The group, tokens and columns of the result that an owner writes."""
        columns = self.config.tile_n // self.shape.halves
        owned = self.owned_tokens
        return work.group, pl.ds(self.part * owned, owned), pl.ds(work.tile * columns, columns)


def run(blocks: Sequence[Block]) -> None:
    """Works on one product after the other; what the later ones read, all blocks of the launch have written."""
    _load_weight(blocks[0], blocks[0].work(0), position=0)
    for block in blocks:
        _load_scale(block)
    position = jnp.int32(0)
    for index in range(len(blocks)):
        if index > 0:
            _meet(blocks, index, position)
        position = _multiply(blocks, index, position)
    plgpu.wait_smem_to_gmem(0)
    _leave(blocks)


def _multiply(blocks: Sequence[Block], index: int, position: jax.Array) -> jax.Array:
    """All rounds of a product, `position` steps after the start; how many steps there were then."""
    block, next_block = blocks[index], blocks[index + 1] if index + 1 < len(blocks) else None
    first, sent_before = block.work(0), _has_sent(blocks[:index])

    @_if(first.exists)
    def _():
        for step in range(block.config.stages - 1):
            _load_x(block, first, step, lax.rem(position + step, block.config.stages))

    def round_(i: jax.Array | int, carry: tuple[jax.Array, Work]) -> tuple[jax.Array, Work]:
        position, work = carry
        following = block.work(i + 1)._replace(exists=False) if block.rounds == 1 else block.work(i + 1)

        @_if(work.exists)
        def _():
            _load_extras(block, work)
            sent = sent_before if isinstance(i, int) else sent_before | (i > 0)
            _combine(block, work, sent, *_stream(block, position, work, following, next_block))

        done = block.steps if work.exists is True else jnp.where(work.exists, block.steps, 0)
        return position + done, following

    if block.rounds == 1:
        return round_(0, (position, first))[0]
    return lax.fori_loop(0, block.rounds, round_, (position, first))[0]


def _load_weight(block: Block, work: Work, position: jax.Array | int) -> None:
    """Starts the copies of the first tiles of a product's weight. One stage is filled only in its first step."""

    @_if(work.exists)
    def _():
        for step in range(block.config.stages - 1):
            _load_w(block, work, step, lax.rem(position + step, block.config.stages))


def _load_w(block: Block, work: Work, step: jax.Array | int, stage: jax.Array | int) -> None:
    """Starts the copies of one step of a round: a tile of the weight."""
    config, shape, smem = block.config, block.shape, block.smem
    row = (block.part * block.steps + step) * config.tile_d
    column = work.tile * (config.tile_n // shape.halves)
    ring, loaded = smem.w.at[stage], smem.w_loaded.at[stage]
    block.tiles.load(block.gmem.w, ring, loaded, expert=work.expert, column=column, row=row)


def _load_x(block: Block, work: Work, step: jax.Array | int, stage: jax.Array | int) -> None:
    """Starts the copies of the x that this step's tile of the weight meets."""
    config, smem = block.config, block.smem
    width = config.tile_d // config.pieces
    for piece in range(config.pieces):
        row = (block.part * block.steps + step) * config.tile_d + piece * width
        # Rows past the last token are filled with zeros. JAX 0.12 refuses a slice that is known to reach past the end.
        tokens = pl.ds(row * 0, block.shape.padded_tokens)
        source = block.gmem.x.at[work.group, tokens, pl.ds(row, width)]
        plgpu.copy_gmem_to_smem(source, smem.x.at[stage, piece], smem.x_loaded.at[stage])


def _load_scale(block: Block) -> None:
    """Copies the part of a norm's scale that the block multiplies."""
    if block.gmem.scale is None:
        return
    rows = block.steps * block.config.tile_d // ROWS
    source = block.gmem.scale.at[pl.ds(block.part * rows, rows)]
    plgpu.copy_gmem_to_smem(source, block.smem.scale, block.smem.scale_loaded)
    plgpu.barrier_wait(block.smem.scale_loaded)


def _meet(blocks: Sequence[Block], index: int, position: jax.Array) -> None:
    """Waits until all blocks of the launch have written their results of the product before number `index`."""
    block, before = blocks[index], blocks[index - 1].work(0)
    if before.exists is not True:
        # Whoever had work has started the next copies under the last of it.
        pl.when(jnp.logical_not(before.exists))(lambda: _load_weight(block, block.work(0), position))
    plgpu.wait_smem_to_gmem(0)
    if block.config.exchange == "gmem":
        assert block.clusters == 1, "the interpreter knows no barrier of more than a cluster"
        plgpu.barrier_arrive(block.smem.met)
        plgpu.barrier_wait(block.smem.met)
        return
    hopper.meet(block.gmem.counters.at[index - 1], block.blocks)
    if index == len(blocks) - 1:
        hopper.count_in(block.gmem.counters.at[index])


def _leave(blocks: Sequence[Block]) -> None:
    """Stays as long as another block may arrive at this one's barriers, and leaves the counters as they were."""
    block, last = blocks[0], len(blocks) - 1
    if block.reuses_inbox:
        _if(_has_sent(blocks))(lambda: plgpu.barrier_wait(block.smem.inbox_free))
    if last > 0 and block.config.exchange != "gmem":
        is_first = (lax.axis_index("cluster") == 0) & (lax.axis_index("part") == 0)

        @pl.when(is_first)
        def _():
            # Every block has left the last meeting, so nobody reads the counters any more.
            hopper.count_out(block.gmem.counters.at[last], block.blocks)
            for meeting in range(last):
                block.gmem.counters[meeting] = 0


def _load_extras(block: Block, work: Work) -> None:
    """Starts the copies that the epilogue waits for, in the blocks that run it."""
    gmem, smem = block.gmem, block.smem
    group, tokens, columns = block.result(work)

    @_if(True if block.config.split == 1 else block.part < block.config.owners(block.shape))
    def _():
        if gmem.bias is not None:
            expert = 0 if work.expert is None else work.expert
            plgpu.copy_gmem_to_smem(gmem.bias.at[expert, :, columns], smem.bias, smem.extras_loaded)
        if gmem.residual is not None:
            plgpu.copy_gmem_to_smem(gmem.residual.at[group, tokens, columns], smem.residual, smem.extras_loaded)


def _stream(
    block: Block, start: jax.Array, work: Work, following: Work, next_block: Block | None
) -> tuple[jax.Array, jax.Array | None]:
    """Multiplies the block's part of D: its product_NM, and for a norm the squares of x_DM, in sums of D / 64."""
    config, shape, smem, tiles = block.config, block.shape, block.smem, block.tiles

    def step(i: jax.Array, squares: jax.Array | None, product: Ref) -> jax.Array | None:
        stage = lax.rem(start + i, config.stages)
        plgpu.barrier_wait(smem.x_loaded.at[stage])
        squares = _scale_x(block, i, stage, squares)
        plgpu.barrier_wait(smem.w_loaded.at[stage])
        tiles.multiply(product, smem.w.at[stage], smem.x.at[stage])
        plgpu.wgmma_wait(tiles.copies)  # this step runs on while the stage of the one before it, now read, is refilled
        plgpu.commit_smem()  # every warp has waited
        _refill(block, start + i, i, work, following, next_block)
        return squares

    def multiply_all(product: Ref) -> tuple[jax.Array, jax.Array | None]:
        squares = None if block.gmem.scale is None else _zeros(ROWS, shape.padded_tokens)
        squares = lax.fori_loop(0, block.steps, partial(step, product=product), squares)
        return product[...], squares

    return pl.run_scoped(multiply_all, plgpu.WGMMAAccumulatorRef((config.tile_n, shape.padded_tokens), jnp.float32))


def _refill(
    block: Block, position: jax.Array, step: jax.Array, work: Work, following: Work, next_block: Block | None
) -> None:
    """Loads the step that is as far ahead as there are stages: of this round, of the next, or of the next product.

    The x of the next product is not there yet.
    """
    ahead = block.config.stages - 1
    stage, step, steps = lax.rem(position + ahead, block.config.stages), step + ahead, block.steps

    @pl.when(step < steps)
    def _():
        _load_w(block, work, step, stage)
        _load_x(block, work, step, stage)

    if block.rounds > 1:

        @pl.when((step >= steps) & following.exists)
        def _():
            _load_w(block, following, step - steps, stage)
            _load_x(block, following, step - steps, stage)

    if next_block is not None:
        next_work = next_block.work(0)

        @pl.when((step >= steps) & jnp.logical_not(following.exists) & next_work.exists)
        def _():
            _load_w(next_block, next_work, step - steps, stage)


def _scale_x(block: Block, step: jax.Array, stage: jax.Array, squares_DM: jax.Array | None) -> jax.Array | None:
    """Multiplies the stage's x_MD by the norm's scale if there is a norm, and adds up its squares.

    The norm's factor of a token multiplies the finished product instead: it is the same for all of D, and known only
    when all of x has been seen. What the tensor cores take is rounded once, as the normed x would be.
    """
    if squares_DM is None:
        return None
    config = block.config
    groups = config.tile_d // config.pieces // ROWS
    for piece, group in itertools.product(range(config.pieces), range(groups)):
        x_ref = block.smem.x.at[stage, piece, :, pl.ds(group * ROWS, ROWS)].T
        x_DM = plgpu.load(x_ref, layout=WGMMA, optimized=False).astype(jnp.float32)
        scale_ref = block.smem.scale.at[(step * config.pieces + piece) * groups + group]
        scale_D = plgpu.load(scale_ref, layout=BY_COLUMN, optimized=False).astype(jnp.float32)
        x_ref[...] = (x_DM * lax.broadcast_in_dim(scale_D, x_DM.shape, (0,))).astype(block.shape.dtype)
        squares_DM += x_DM * x_DM
    plgpu.commit_smem()
    return squares_DM


def _has_sent(blocks: Sequence[Block]) -> jax.Array | bool:
    """Whether the block has sent partial sums of one of these products."""
    sent: jax.Array | bool = False
    for block in blocks:
        if block.config.split > 1:
            sent = sent | block.work(0).exists
    return sent


def _combine(
    block: Block, work: Work, sent: jax.Array | bool, product_NM: jax.Array, squares_DM: jax.Array | None
) -> None:
    if block.config.split == 1:
        _finish(block, work, product_NM, squares_DM)
        return
    if block.reuses_inbox:
        _if(sent)(lambda: plgpu.barrier_wait(block.smem.inbox_free))
    _send(block, product_NM, squares_DM)

    @pl.when(block.part < block.config.owners(block.shape))
    def _():
        sums = _receive(block)
        if block.reuses_inbox:
            plgpu.barrier_arrive(block.smem.inbox_free)
        _finish(block, work, *sums)

    if block.reuses_inbox:
        owns = block.part < block.config.owners(block.shape)
        pl.when(jnp.logical_not(owns))(lambda: plgpu.barrier_arrive(block.smem.inbox_free))


def _send(block: Block, product_NM: jax.Array, squares_DM: jax.Array | None) -> None:
    """Gives every owner its tokens of this block's partial sums."""
    config, gmem, smem, owned = block.config, block.gmem, block.smem, block.owned_tokens
    sums = {"products": product_NM} | ({} if squares_DM is None else {"squares": squares_DM})
    for owner in range(config.owners(block.shape)):
        for name, array in sums.items():
            piece = array[:, owner * owned : (owner + 1) * owned]
            if config.exchange == "gmem":
                getattr(gmem, name)[lax.axis_index("cluster"), owner, block.part] = piece
                continue
            plgpu.async_store_smem(
                piece,
                getattr(smem, name).at[block.part],
                smem.received,
                cluster_idx=jnp.int32(owner),
                cluster_dim="part",
                optimized=False,
            )
    if config.exchange == "gmem":
        plgpu.commit_smem()  # every warp has stored
        plgpu.barrier_arrive(smem.received)
        plgpu.barrier_wait(smem.received)  # every block stays until no other arrives at its barrier


def _receive(block: Block) -> tuple[jax.Array, jax.Array | None]:
    """The sums over all parts of D, added up in their order: the same bits on every run."""
    if block.config.exchange == "smem":
        plgpu.barrier_wait(block.smem.received)

    def total(name: str) -> jax.Array:
        if block.config.exchange == "gmem":
            inbox = getattr(block.gmem, name).at[lax.axis_index("cluster"), block.part]
        else:
            inbox = getattr(block.smem, name)
        pieces = [plgpu.load(inbox.at[i], layout=WGMMA, optimized=False) for i in range(block.config.split)]
        return sum(pieces[1:], pieces[0])

    return total("products"), None if block.gmem.scale is None else total("squares")


def _finish(block: Block, work: Work, product_NM: jax.Array, squares_DM: jax.Array | None) -> None:
    """The rest of the norm, the bias, the gate and the residual, in float32; then the one rounding."""
    gmem, smem, shape = block.gmem, block.smem, block.shape
    if gmem.bias is not None or gmem.residual is not None:
        plgpu.barrier_wait(smem.extras_loaded)
    if squares_DM is not None:
        mean_M = jnp.sum(squares_DM, axis=0) * (1 / shape.hidden)
        product_NM *= lax.broadcast_in_dim(lax.rsqrt(mean_M + block.norm_eps), product_NM.shape, (1,))
    columns = product_NM.shape[0] // shape.halves
    halves = [product_NM[half * columns : (half + 1) * columns] for half in range(shape.halves)]
    if gmem.bias is not None:
        for half in range(shape.halves):
            bias_N = plgpu.load(smem.bias.at[half], layout=BY_COLUMN, optimized=False).astype(jnp.float32)
            halves[half] += lax.broadcast_in_dim(bias_N, halves[half].shape, (0,))
    out_NM = halves[0] if shape.halves == 1 else halves[0] * lax.logistic(halves[0]) * halves[1]
    if shape.residual_dtype is not None:
        residual_NM = plgpu.load(smem.residual.T, layout=_transposing(shape.residual_dtype), optimized=False)
        out_NM += plgpu.layout_cast(residual_NM.astype(jnp.float32), WGMMA)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the round before
    smem.out.T[...] = plgpu.layout_cast(out_NM.astype(shape.out_dtype), _transposing(shape.out_dtype))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem.out, gmem.out.at[block.result(work)])  # rows beyond the last token are dropped


def _transposing(dtype: jnp.dtype) -> plgpu.Layout:
    """The layout of an array of `dtype` on its way from or to its transpose in shared memory.

    16-bit numbers are transposed by the instructions that move matrices between the two, 32-bit ones in registers.
    """
    return WGMMA if jnp.dtype(dtype).itemsize == 2 else plgpu.Layout.WGMMA_TRANSPOSED


def _if(condition: jax.Array | bool) -> Any:
    """`pl.when`, but nothing of it where the condition is known."""
    if isinstance(condition, bool):
        return (lambda body: body()) if condition else (lambda body: None)
    return pl.when(condition)


def _zeros(rows: int, columns: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), WGMMA)

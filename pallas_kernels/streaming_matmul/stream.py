"""The stream of `streaming_matmul`: how a block of threads reads the weights of one product, or of several in a row.

A block streams tiles of the weight through a ring of buffers and does not pause between its tiles of columns. Nor does
it between products of which each reads the result of the one before: while the blocks of the launch wait for each
other, the first tiles of the next weight are on their way, which need not wait. epilogue.py is what becomes of a
round's product.
"""

import itertools
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.streaming_matmul.block import BY_COLUMN, WGMMA, Block, Work, when
from pallas_kernels.streaming_matmul.config import ROWS
from pallas_kernels.streaming_matmul.epilogue import combine, has_sent, load_extras, wait_for_inbox
from pallas_kernels.streaming_matmul.weights import Ref


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
    first, sent_before = block.work(0), has_sent(blocks[:index])

    @when(first.exists)
    def _():
        for step in range(block.config.stages - 1):
            _load_x(block, first, step, lax.rem(position + step, block.config.stages))

    def round_(i: jax.Array | int, carry: tuple[jax.Array, Work]) -> tuple[jax.Array, Work]:
        position, work = carry
        following = block.work(i + 1)._replace(exists=False) if block.rounds == 1 else block.work(i + 1)

        @when(work.exists)
        def _():
            load_extras(block, work)
            sent = sent_before if isinstance(i, int) else sent_before | (i > 0)
            combine(block, work, sent, *_stream(block, position, work, following, next_block))

        done = block.steps if work.exists is True else jnp.where(work.exists, block.steps, 0)
        return position + done, following

    if block.rounds == 1:
        return round_(0, (position, first))[0]
    return lax.fori_loop(0, block.rounds, round_, (position, first))[0]


def _load_weight(block: Block, work: Work, position: jax.Array | int) -> None:
    """Starts the copies of the first tiles of a product's weight. One stage is filled only in its first step."""

    @when(work.exists)
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
        hopper.signal(block.gmem.counters.at[index])


def _leave(blocks: Sequence[Block]) -> None:
    """Stays as long as another block may arrive at this one's barriers, and leaves the counters as they were."""
    block, last = blocks[0], len(blocks) - 1
    wait_for_inbox(block, has_sent(blocks))
    if last > 0 and block.config.exchange != "gmem":
        is_first = (lax.axis_index("cluster") == 0) & (lax.axis_index("part") == 0)

        @pl.when(is_first)
        def _():
            # Every block has left the last meeting, so nobody reads the counters any more.
            hopper.wait_for(block.gmem.counters.at[last], block.blocks)
            for meeting in range(last):
                block.gmem.counters[meeting] = 0


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


def _zeros(rows: int, columns: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), WGMMA)

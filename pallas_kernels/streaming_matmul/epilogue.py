"""The epilogue of `streaming_matmul`: from a block's part of a product to the result, in device memory.

Blocks that share columns have multiplied a part of D each: some of them own tokens of the result, and every block
sends them its partial sums of theirs. The owners add them up and finish what they own.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.streaming_matmul.block import BY_COLUMN, WGMMA, Block, Work, when


def load_extras(block: Block, work: Work) -> None:
    """Starts the copies that the epilogue waits for, in the blocks that run it."""
    gmem, smem = block.gmem, block.smem
    group, tokens, columns = block.result(work)

    @when(True if block.config.split == 1 else block.part < block.config.owners(block.shape))
    def _():
        if gmem.bias is not None:
            expert = 0 if work.expert is None else work.expert
            plgpu.copy_gmem_to_smem(gmem.bias.at[expert, :, columns], smem.bias, smem.extras_loaded)
        if gmem.residual is not None:
            plgpu.copy_gmem_to_smem(gmem.residual.at[group, tokens, columns], smem.residual, smem.extras_loaded)


def combine(
    block: Block, work: Work, sent: jax.Array | bool, product_NM: jax.Array, squares_DM: jax.Array | None
) -> None:
    """Makes of the round's products of all blocks that share its columns the result; `sent` as in `wait_for_inbox`."""
    if block.config.split == 1:
        _finish(block, work, product_NM, squares_DM)
        return
    wait_for_inbox(block, sent)
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


def has_sent(blocks: Sequence[Block]) -> jax.Array | bool:
    """Whether the block has sent partial sums of one of these products."""
    sent: jax.Array | bool = False
    for block in blocks:
        if block.config.split > 1:
            sent = sent | block.work(0).exists
    return sent


def wait_for_inbox(block: Block, sent: jax.Array | bool) -> None:
    """Waits until the owners have read the partial sums that the block has `sent` before, if it has."""
    if block.reuses_inbox:
        when(sent)(lambda: plgpu.barrier_wait(block.smem.inbox_free))


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

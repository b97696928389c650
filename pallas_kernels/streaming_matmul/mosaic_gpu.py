"""`streaming_matmul` for Hopper: the weight streams through shared memory once, at the rate of device memory.

The weight takes the side of the tensor cores that is 64 rows deep, the few tokens the other one: y^T = w^T x^T. Each
block multiplies `tile_n` columns by its part of D; the blocks of a cluster that share the columns send each other
their partial sums.
"""

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.streaming_matmul.arguments import Arguments
from pallas_kernels.streaming_matmul.config import MAX_TOKENS, Buffer, Config, Shape, buffers, config_for
from pallas_kernels.streaming_matmul.weights import Ref, Tiles

WGMMA = plgpu.Layout.WGMMA
BY_COLUMN = WGMMA.reduce(1)
OPERAND = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]


@partial(jax.jit, static_argnames=("config",))
def streaming_matmul(arguments: Arguments, *, config: Config | None = None) -> jax.Array:
    """See the public op; `unsupported` says what this one does not take."""
    M = arguments.x_MD.shape[0]
    if M > 8 and M % 8:  # copies beyond the first 8 tokens take whole groups of 8
        return streaming_matmul(_padded(arguments, -M % 8), config=config)[:M]
    shape = Shape.of(arguments)
    config = config or config_for(shape)
    config.check(shape)
    named = {
        "x": arguments.x_MD,
        "w": arguments.w,
        "scale": arguments.norm_scale_D,
        "bias": arguments.bias if arguments.gated or arguments.bias is None else arguments.bias[None],
        "residual": arguments.residual_MN,
    }
    operands = {name: array for name, array in named.items() if array is not None}
    outputs = {"out": jax.ShapeDtypeStruct((shape.tokens, shape.outputs), shape.out_dtype)} | _exchanged(config, shape)

    def body(*refs: Ref, **scratch: Ref) -> None:
        gmem = dict.fromkeys(named) | dict(zip([*operands, *outputs], refs, strict=True))
        _block(Block(shape, config, arguments.norm_eps, SimpleNamespace(**gmem), SimpleNamespace(**scratch)))

    run = plgpu.kernel(
        body,
        out_type=tuple(outputs.values()),
        grid=(config.tiles(shape),),
        grid_names=("tile",),
        cluster=(config.split,),
        cluster_names=("part",),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=_scratch(config, shape),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="streaming_matmul",
    )
    return run(*operands.values())[0]


def unsupported(arguments: Arguments) -> str | None:
    """Why the kernel cannot take these arguments; None if it can."""
    shape = Shape.of(arguments)
    if shape.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {shape.dtype}; the tensor cores take bfloat16 and float16"
    if shape.tokens > MAX_TOKENS:
        return f"x has {shape.tokens} tokens; at most {MAX_TOKENS}"
    if shape.hidden % 64:
        return f"D is {shape.hidden}; a multiple of 64"
    if shape.outputs % 64:
        return f"N is {shape.outputs}; a multiple of 64"
    if shape.norm_dtype is not None and shape.dtype == jnp.float16:
        return "x is float16 and normed; x times its scale, before the norm divides it, may exceed float16"
    return None


@dataclass(frozen=True)
class Block:
    """A block of threads at work: its problem, and its view of device and shared memory."""

    shape: Shape
    config: Config
    norm_eps: float
    gmem: SimpleNamespace
    smem: SimpleNamespace

    @property
    def tiles(self) -> Tiles:
        return Tiles(self.shape.w_axes, self.config.tile_n, self.config.tile_d)

    @property
    def owned_tokens(self) -> int:
        return self.shape.padded_tokens // self.config.owners(self.shape)

    @property
    def part(self) -> jax.Array:
        """Which part of D; the blocks with the lowest numbers also own tokens of the result."""
        return lax.axis_index("part")

    @property
    def result(self) -> tuple[pl.Slice, pl.Slice]:
        """The tokens and columns of the result that an owner writes."""
        columns = self.config.tile_n // self.shape.halves
        owned = self.owned_tokens
        return pl.ds(self.part * owned, owned), pl.ds(lax.axis_index("tile") * columns, columns)


def _block(block: Block) -> None:
    product, squares = _stream(block)
    if block.config.split == 1:
        _finish(block, product, squares)
        return
    _send(block, product, squares)

    @pl.when(block.part < block.config.owners(block.shape))
    def _():
        _finish(block, *_receive(block))


def _stream(block: Block) -> tuple[jax.Array, jax.Array | None]:
    """Multiplies the block's part of D: its product_NM, and the squares of x_DM if there is a norm, summed by step."""
    config, shape, smem, tiles = block.config, block.shape, block.smem, block.tiles
    steps, stages = config.steps(shape), config.stages
    (_, columns), first = block.result, block.part * steps

    def load_weight(step: jax.Array | int, stage: jax.Array | int) -> None:
        row = (first + step) * config.tile_d
        tiles.load(block.gmem.w, smem.w.at[stage], smem.loaded.at[stage], columns.start, row)

    def load_x(step: jax.Array | int, stage: jax.Array | int) -> None:
        rows = pl.ds((first + step) * config.tile_d, config.tile_d)
        tokens = pl.ds(0, shape.padded_tokens)
        plgpu.copy_gmem_to_smem(block.gmem.x.at[tokens, rows], smem.x.at[stage], smem.loaded.at[stage])
        if block.gmem.scale is not None:
            plgpu.copy_gmem_to_smem(block.gmem.scale.at[rows], smem.scale.at[stage], smem.loaded.at[stage])

    def step(i: jax.Array, squares: jax.Array | None, product: Ref, *, refill: bool) -> jax.Array | None:
        stage = lax.rem(i, stages)
        plgpu.barrier_wait(smem.loaded.at[stage])
        x_MD, squares = _scaled_x(block, stage, squares)
        tiles.multiply(product, smem.w.at[stage], x_MD)
        plgpu.wgmma_wait(0)
        if refill:
            load_weight(i + stages, stage)
            load_x(i + stages, stage)
        return squares

    def multiply_all(product: Ref) -> tuple[jax.Array, jax.Array | None]:
        squares = None if block.gmem.scale is None else _zeros(config.tile_d, shape.padded_tokens)
        squares = lax.fori_loop(0, steps - stages, partial(step, product=product, refill=True), squares)
        if config.early_weights:  # all loads are on their way: the next kernel's may follow
            plgpu.griddepcontrol_launch_dependents()
        squares = lax.fori_loop(steps - stages, steps, partial(step, product=product, refill=False), squares)
        return product[...], squares

    for i in range(stages):
        load_weight(i, i)
    if config.early_weights:  # what follows reads what the previous kernel wrote, or writes what it read
        plgpu.griddepcontrol_wait()
    for i in range(stages):
        load_x(i, i)
    _load_extras(block)
    return pl.run_scoped(multiply_all, plgpu.WGMMAAccumulatorRef((config.tile_n, shape.padded_tokens), jnp.float32))


def _scaled_x(block: Block, stage: jax.Array, squares_DM: jax.Array | None) -> tuple[Ref, jax.Array | None]:
    """The stage's x_MD, times the norm's scale if there is a norm, whose squares are then added up.

    The norm's factor of a token multiplies the finished product instead: it is the same for all of D, and known only
    when all of x has been seen. What the tensor cores take is rounded once, as the normed x would be.
    """
    x_MD = block.smem.x.at[stage]
    if squares_DM is None:
        return x_MD, None
    x_DM = plgpu.load(x_MD.T, layout=WGMMA, optimized=False).astype(jnp.float32)
    scale_D = plgpu.load(block.smem.scale.at[stage], layout=BY_COLUMN, optimized=False).astype(jnp.float32)
    scaled_DM = x_DM * lax.broadcast_in_dim(scale_D, x_DM.shape, (0,))
    block.smem.scaled_x.T[...] = scaled_DM.astype(x_MD.dtype)
    plgpu.commit_smem()
    return block.smem.scaled_x, squares_DM + x_DM * x_DM


def _load_extras(block: Block) -> None:
    """Starts the copies that the epilogue waits for, in the blocks that run it."""
    gmem, smem = block.gmem, block.smem
    tokens, columns = block.result

    @pl.when(block.part < block.config.owners(block.shape))
    def _():
        if gmem.bias is not None:
            plgpu.copy_gmem_to_smem(gmem.bias.at[:, columns], smem.bias, smem.extras_loaded)
        if gmem.residual is not None:
            plgpu.copy_gmem_to_smem(gmem.residual.at[tokens, columns], smem.residual, smem.extras_loaded)


def _send(block: Block, product_NM: jax.Array, squares_DM: jax.Array | None) -> None:
    """Gives every owner its tokens of this block's partial sums."""
    config, gmem, smem, owned = block.config, block.gmem, block.smem, block.owned_tokens
    sums = {"products": product_NM} | ({} if squares_DM is None else {"squares": squares_DM})
    for owner in range(config.owners(block.shape)):
        for name, array in sums.items():
            piece = array[:, owner * owned : (owner + 1) * owned]
            if config.exchange == "gmem":
                getattr(gmem, name)[lax.axis_index("tile"), owner, block.part] = piece
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
        plgpu.barrier_arrive(smem.received)
        plgpu.barrier_wait(smem.received)  # every block stays until no other arrives at its barrier


def _receive(block: Block) -> tuple[jax.Array, jax.Array | None]:
    """The sums over all parts of D, added up in their order: the same bits on every run."""
    if block.config.exchange == "smem":
        plgpu.barrier_wait(block.smem.received)

    def total(name: str) -> jax.Array:
        if block.config.exchange == "gmem":
            inbox = getattr(block.gmem, name).at[lax.axis_index("tile"), block.part]
        else:
            inbox = getattr(block.smem, name)
        pieces = [plgpu.load(inbox.at[i], layout=WGMMA, optimized=False) for i in range(block.config.split)]
        return sum(pieces[1:], pieces[0])

    return total("products"), None if block.gmem.scale is None else total("squares")


def _finish(block: Block, product_NM: jax.Array, squares_DM: jax.Array | None) -> None:
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
    smem.out.T[...] = plgpu.layout_cast(out_NM.astype(shape.out_dtype), _transposing(shape.out_dtype))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem.out, gmem.out.at[block.result])  # rows beyond the last token are dropped
    plgpu.wait_smem_to_gmem(0)


def _transposing(dtype: jnp.dtype) -> plgpu.Layout:
    """The layout of an array of `dtype` on its way from or to its transpose in shared memory.

    16-bit numbers are transposed by the instructions that move matrices between the two, 32-bit ones in registers.
    """
    return WGMMA if jnp.dtype(dtype).itemsize == 2 else plgpu.Layout.WGMMA_TRANSPOSED


def _padded(arguments: Arguments, tokens: int) -> Arguments:
    x_MD, residual_MN = arguments.x_MD, arguments.residual_MN
    x_MD = jnp.pad(x_MD, ((0, tokens), (0, 0)))
    if residual_MN is not None:
        residual_MN = jnp.pad(residual_MN, ((0, tokens), (0, 0)))
    return replace(arguments, x_MD=x_MD, residual_MN=residual_MN)


def _exchanged(config: Config, shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
    """Partial sums that meet in device memory, by tile, owner and part."""
    if config.split == 1 or config.exchange == "smem":
        return {}
    owners = config.owners(shape)
    leading, owned = (config.tiles(shape), owners, config.split), shape.padded_tokens // owners
    rows = {"products": config.tile_n} | ({} if shape.norm_dtype is None else {"squares": config.tile_d})
    return {name: jax.ShapeDtypeStruct((*leading, n, owned), jnp.float32) for name, n in rows.items()}


def _scratch(config: Config, shape: Shape) -> dict[str, Any]:
    def allocate(buffer: Buffer) -> Any:
        return plgpu.SMEM(buffer.shape, buffer.dtype, transforms=OPERAND if buffer.operand else ())

    scratch: dict[str, Any] = {name: allocate(buffer) for name, buffer in buffers(config, shape).items()}
    copies = Tiles(shape.w_axes, config.tile_n, config.tile_d).copies + 1 + (shape.norm_dtype is not None)
    scratch["loaded"] = plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages)
    if extras := (shape.bias_dtype is not None) + (shape.residual_dtype is not None):
        scratch["extras_loaded"] = plgpu.Barrier(num_arrivals=extras)
    if config.split > 1:
        sums = 1 + (shape.norm_dtype is not None)
        scratch["received"] = (
            plgpu.Barrier(num_arrivals=config.split * sums)
            if config.exchange == "smem"
            else plgpu.ClusterBarrier(collective_axes=("part",))
        )
    return scratch


def _zeros(rows: int, columns: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), WGMMA)

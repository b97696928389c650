"""`streaming_matmul` for Hopper: the weight streams through shared memory once, at the rate of device memory.

The weight takes the side of the tensor cores that is 64 rows deep, the few tokens the other one: y^T = w^T x^T. Each
block multiplies `tile_n` columns by its part of D, and goes on to other columns without a pause in its reading; the
blocks of a cluster that share the columns send each other their partial sums.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.streaming_matmul import xla
from pallas_kernels.streaming_matmul.arguments import Arguments
from pallas_kernels.streaming_matmul.config import MAX_TOKENS, ROWS, Buffer, Config, Shape, buffers, config_for
from pallas_kernels.streaming_matmul.weights import Ref, Tiles

WGMMA = plgpu.Layout.WGMMA
BY_COLUMN = WGMMA.reduce(1)
OPERAND = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]


@partial(jax.jit, static_argnames=("config",))
def streaming_matmul(arguments: Arguments, *, config: Config | None = None) -> jax.Array:
    """See the public op; `unsupported` says what this one does not take."""
    M = arguments.x.shape[-2]
    if M > 8 and M % 8:  # copies beyond the first 8 tokens take whole groups of 8
        arguments = _padded(arguments, -M % 8)
    y: Any = _launch(config, arguments)
    return y if y.shape[-2] == M else y[..., :M, :]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _launch(config: Config | None, arguments: Arguments) -> jax.Array:
    shape = Shape.of(arguments)
    config = config or config_for(shape)
    config.check(shape)
    named = _operands(arguments)
    operands = {name: array for name, array in named.items() if array is not None}
    out_AMN = jax.ShapeDtypeStruct((shape.groups, shape.tokens, shape.outputs), shape.out_dtype)
    outputs = {"out": out_AMN} | _exchanged(config, shape)

    def body(*refs: Ref, **scratch: Ref) -> None:
        gmem = dict.fromkeys(named) | dict(zip([*operands, *outputs], refs, strict=True))
        _run(Block(shape, config, arguments.norm_eps, SimpleNamespace(**gmem), SimpleNamespace(**scratch)))

    run = plgpu.kernel(
        body,
        out_type=tuple(outputs.values()),
        grid=(config.clusters(shape),),
        grid_names=("cluster",),
        cluster=(config.split,),
        cluster_names=("part",),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=_scratch(config, shape),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="streaming_matmul",
    )
    y_AMN = _varying_as(run(*operands.values())[0], operands.values())
    return y_AMN if arguments.of_experts else y_AMN[0]


@_launch.defjvp
def _derivative(config: Config | None, primals: tuple[Arguments], tangents: tuple[Arguments]) -> tuple[Any, Any]:
    """That of the same function in plain XLA."""
    (arguments,) = primals
    _, tangent = jax.jvp(xla.streaming_matmul, primals, tangents)
    return _launch(config, arguments), tangent


def _varying_as(y: jax.Array, operands: Iterable[jax.Array]) -> jax.Array:
    """Inside a shard_map that tracks it, y varies over the mesh axes that an operand varies over."""
    axes = frozenset().union(*(jax.typeof(operand).mat.varying for operand in operands))
    return lax.pcast(y, tuple(axes), to="varying") if axes else y


def unsupported(arguments: Arguments) -> str | None:
    """Why the kernel cannot take these arguments; None if it can."""
    shape = Shape.of(arguments)
    if shape.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {shape.dtype}; the tensor cores take bfloat16 and float16"
    if shape.tokens > MAX_TOKENS:
        return f"x has {shape.tokens} tokens; at most {MAX_TOKENS}"
    if shape.hidden % 64 or shape.hidden < 128:
        return f"D is {shape.hidden}; a multiple of 64, from 128"
    if shape.outputs % 64:
        return f"N is {shape.outputs}; a multiple of 64"
    if shape.norm_dtype is not None and shape.dtype == jnp.float16:
        return "x is float16 and normed; x times its scale, before the norm divides it, may exceed float16"
    return None


class Work(NamedTuple):
    """What a block multiplies in one round: a tile of columns, for one group of tokens."""

    exists: jax.Array | bool
    group: jax.Array | int
    tile: jax.Array
    expert: jax.Array | None


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

    def work(self, round_: jax.Array | int) -> Work:
        """In a round, neighbouring blocks have neighbouring columns."""
        tiles = self.config.tiles(self.shape)
        item = lax.axis_index("cluster") + round_ * self.config.clusters(self.shape)
        exists = True if self.config.rounds == 1 else item < self.shape.groups * tiles
        group, tile = (0, item) if self.shape.groups == 1 else (lax.div(item, tiles), lax.rem(item, tiles))
        if self.gmem.expert is None:
            return Work(exists, group, tile, None)
        return Work(exists, group, tile, self.gmem.expert[lax.min(group, self.shape.groups - 1)])

    def result(self, work: Work) -> tuple[jax.Array | int, pl.Slice, pl.Slice]:
        """The group, tokens and columns of the result that an owner writes."""
        columns = self.config.tile_n // self.shape.halves
        owned = self.owned_tokens
        return work.group, pl.ds(self.part * owned, owned), pl.ds(work.tile * columns, columns)


def _run(block: Block) -> None:
    first, rows = block.work(0), block.config.steps(block.shape) * block.config.tile_d // ROWS
    for step in range(block.config.stages):
        _load(block, first, step, step)
    if block.gmem.scale is not None:
        source = block.gmem.scale.at[pl.ds(block.part * rows, rows)]
        plgpu.copy_gmem_to_smem(source, block.smem.scale, block.smem.scale_loaded)
        plgpu.barrier_wait(block.smem.scale_loaded)

    def round_(i: jax.Array | int, work: Work) -> Work:
        following = block.work(i + 1)._replace(exists=False) if block.config.rounds == 1 else block.work(i + 1)

        @_if(work.exists)
        def _():
            _load_extras(block, work)
            _combine(block, work, *_stream(block, i, work, following))

        return following

    if block.config.rounds == 1:
        round_(0, first)
    else:
        lax.fori_loop(0, block.config.rounds, round_, first)
    plgpu.wait_smem_to_gmem(0)


def _load(block: Block, work: Work, step: jax.Array | int, stage: jax.Array | int) -> None:
    """Starts the copies of one step of a round: a tile of the weight, and the x it meets."""
    config, shape, gmem, smem = block.config, block.shape, block.gmem, block.smem
    row = (block.part * config.steps(shape) + step) * config.tile_d
    column = work.tile * (config.tile_n // shape.halves)
    loaded, rows = smem.loaded.at[stage], pl.ds(row, config.tile_d)
    block.tiles.load(gmem.w, smem.w.at[stage], loaded, expert=work.expert, column=column, row=row)
    # Rows past the last token are filled with zeros. JAX 0.12 refuses a slice that is known to reach past the end.
    tokens = pl.ds(row * 0, shape.padded_tokens)
    plgpu.copy_gmem_to_smem(gmem.x.at[work.group, tokens, rows], smem.x.at[stage], loaded)


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


def _stream(block: Block, round_: jax.Array | int, work: Work, following: Work) -> tuple[jax.Array, jax.Array | None]:
    """Multiplies the block's part of D: its product_NM, and for a norm the squares of x_DM, in sums of D / 64."""
    config, shape, smem, tiles = block.config, block.shape, block.smem, block.tiles
    steps, stages = config.steps(shape), config.stages

    def step(i: jax.Array, squares: jax.Array | None, product: Ref) -> jax.Array | None:
        position = round_ * steps + i
        stage = lax.rem(position, stages)
        plgpu.barrier_wait(smem.loaded.at[stage])
        squares = _scale_x(block, i, stage, squares)
        tiles.multiply(product, smem.w.at[stage], smem.x.at[stage])
        plgpu.wgmma_wait(tiles.copies)  # this step runs on while the stage of the one before it, now read, is refilled
        plgpu.commit_smem()  # every warp has waited
        _refill(block, position, i + stages - 1, work, following)
        return squares

    def multiply_all(product: Ref) -> tuple[jax.Array, jax.Array | None]:
        squares = None if block.gmem.scale is None else _zeros(ROWS, shape.padded_tokens)
        squares = lax.fori_loop(0, steps, partial(step, product=product), squares)
        return product[...], squares

    return pl.run_scoped(multiply_all, plgpu.WGMMAAccumulatorRef((config.tile_n, shape.padded_tokens), jnp.float32))


def _refill(block: Block, position: jax.Array, step: jax.Array, work: Work, following: Work) -> None:
    """Loads, behind `position` steps, the step that many of this round ahead; past its end, one of the next round."""
    steps, stages = block.config.steps(block.shape), block.config.stages
    stage = lax.rem(position + stages - 1, stages)

    @pl.when((position > 0) & (step < steps))
    def _():
        _load(block, work, step, stage)

    if block.config.rounds > 1:

        @pl.when((step >= steps) & following.exists)
        def _():
            _load(block, following, step - steps, stage)


def _scale_x(block: Block, step: jax.Array, stage: jax.Array, squares_DM: jax.Array | None) -> jax.Array | None:
    """Multiplies the stage's x_MD by the norm's scale if there is a norm, and adds up its squares.

    The norm's factor of a token multiplies the finished product instead: it is the same for all of D, and known only
    when all of x has been seen. What the tensor cores take is rounded once, as the normed x would be.
    """
    if squares_DM is None:
        return None
    pieces = block.config.tile_d // ROWS
    for piece in range(pieces):
        x_ref = block.smem.x.at[stage, :, pl.ds(piece * ROWS, ROWS)].T
        x_DM = plgpu.load(x_ref, layout=WGMMA, optimized=False).astype(jnp.float32)
        scale_ref = block.smem.scale.at[step * pieces + piece]
        scale_D = plgpu.load(scale_ref, layout=BY_COLUMN, optimized=False).astype(jnp.float32)
        x_ref[...] = (x_DM * lax.broadcast_in_dim(scale_D, x_DM.shape, (0,))).astype(block.shape.dtype)
        squares_DM += x_DM * x_DM
    plgpu.commit_smem()
    return squares_DM


def _combine(block: Block, work: Work, product_NM: jax.Array, squares_DM: jax.Array | None) -> None:
    if block.config.split == 1:
        _finish(block, work, product_NM, squares_DM)
        return
    _send(block, product_NM, squares_DM)

    @pl.when(block.part < block.config.owners(block.shape))
    def _():
        _finish(block, work, *_receive(block))


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
    if block.config.rounds > 1:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    smem.out.T[...] = plgpu.layout_cast(out_NM.astype(shape.out_dtype), _transposing(shape.out_dtype))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem.out, gmem.out.at[block.result(work)])  # rows beyond the last token are dropped


def _transposing(dtype: jnp.dtype) -> plgpu.Layout:
    """The layout of an array of `dtype` on its way from or to its transpose in shared memory.

    16-bit numbers are transposed by the instructions that move matrices between the two, 32-bit ones in registers.
    """
    return WGMMA if jnp.dtype(dtype).itemsize == 2 else plgpu.Layout.WGMMA_TRANSPOSED


def _operands(arguments: Arguments) -> dict[str, jax.Array | None]:
    """The kernel's inputs by name, with an axis of one group or one expert where there are none."""

    def leading(array: jax.Array | None) -> jax.Array | None:
        return array if array is None or arguments.of_experts else array[None]

    bias = arguments.bias
    if bias is not None and not arguments.gated:
        bias = bias[..., None, :]
    return {
        "x": leading(arguments.x),
        "w": arguments.w,
        "expert": arguments.expert_A,
        "scale": None if arguments.norm_scale_D is None else arguments.norm_scale_D.reshape(-1, ROWS),
        "bias": leading(bias),
        "residual": leading(arguments.residual_MN),
    }


def _padded(arguments: Arguments, tokens: int) -> Arguments:
    def padded(array: jax.Array) -> jax.Array:
        return jnp.pad(array, ((0, 0),) * (array.ndim - 2) + ((0, tokens), (0, 0)))

    residual_MN = None if arguments.residual_MN is None else padded(arguments.residual_MN)
    return replace(arguments, x=padded(arguments.x), residual_MN=residual_MN)


def _exchanged(config: Config, shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
    """Partial sums that meet in device memory, by cluster, owner and part."""
    if config.split == 1 or config.exchange == "smem":
        return {}
    owners = config.owners(shape)
    leading, owned = (config.clusters(shape), owners, config.split), shape.padded_tokens // owners
    rows = {"products": config.tile_n} | ({} if shape.norm_dtype is None else {"squares": ROWS})
    return {name: jax.ShapeDtypeStruct((*leading, n, owned), jnp.float32) for name, n in rows.items()}


def _scratch(config: Config, shape: Shape) -> dict[str, Any]:
    def allocate(buffer: Buffer) -> Any:
        return plgpu.SMEM(buffer.shape, buffer.dtype, transforms=OPERAND if buffer.operand else ())

    scratch: dict[str, Any] = {name: allocate(buffer) for name, buffer in buffers(config, shape).items()}
    copies = Tiles(shape.w_axes, config.tile_n, config.tile_d).copies + 1
    scratch["loaded"] = plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages)
    if shape.norm_dtype is not None:
        scratch["scale_loaded"] = plgpu.Barrier()
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


def _if(condition: jax.Array | bool) -> Any:
    """`pl.when`, but nothing of it where the condition is known to hold."""
    return (lambda body: body()) if condition is True else pl.when(condition)


def _zeros(rows: int, columns: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), WGMMA)

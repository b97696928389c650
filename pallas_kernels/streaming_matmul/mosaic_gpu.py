"""`streaming_matmul` for Hopper: the weight streams through shared memory once, at the rate of device memory.

The weight takes the side of the tensor cores that is 64 rows deep, the few tokens the other one: y^T = w^T x^T. Each
block multiplies `tile_n` columns by its part of D, and goes on to other columns without a pause in its reading; the
blocks of a cluster that share the columns send each other their partial sums. This file launches, for one product or
a row of them; stream.py and epilogue.py are what a block does.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.dispatch import MULTIPROCESSORS, Refusal
from pallas_kernels.hopper import SHARED_BYTES
from pallas_kernels.lowered import once
from pallas_kernels.streaming_matmul import xla
from pallas_kernels.streaming_matmul.arguments import Arguments
from pallas_kernels.streaming_matmul.block import Block
from pallas_kernels.streaming_matmul.config import (
    MAX_TOKENS,
    MAX_TOKENS_OF_ROW,
    ROWS,
    Buffer,
    Config,
    MLPConfig,
    Shape,
    buffers,
    config_for,
    mlp_config_for,
    row_refusal,
    smem_bytes,
)
from pallas_kernels.streaming_matmul.mlp import MLPArguments, Result, compose, products
from pallas_kernels.streaming_matmul.stream import run
from pallas_kernels.streaming_matmul.weights import Ref, Tiles

OPERAND = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]


@partial(jax.jit, static_argnames=("config",))
def streaming_matmul(arguments: Arguments, *, config: Config | None = None) -> jax.Array:
    """See the public op; `unsupported` says what this one does not take."""
    return _in_groups_of_8(partial(_product, config), arguments)


def _in_groups_of_8(compute: Callable[[Any], Any], arguments: Arguments | MLPArguments) -> jax.Array:
    """`compute` of the arguments with tokens added and their results cut off: beyond the first 8, a copy takes whole
    groups of 8 tokens."""
    M = arguments.tokens
    if M <= 8 or M % 8 == 0:
        return compute(arguments)
    return compute(arguments.padded(-M % 8))[..., :M, :]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(config: Config | None, arguments: Arguments) -> jax.Array:
    shape = Shape.of(arguments)
    config = config or config_for(shape)
    config.check(shape)
    y_AMN = launch([Product(shape, config, arguments.norm_eps, _operands(arguments))], config.clusters(shape))[0]
    return y_AMN if arguments.of_experts else y_AMN[0]


@_product.defjvp
def _derivative(config: Config | None, primals: tuple[Arguments], tangents: tuple[Arguments]) -> tuple[Any, Any]:
    """That of the same function in plain XLA."""
    (arguments,) = primals
    _, tangent = jax.jvp(xla.streaming_matmul, primals, tangents)
    return _product(config, arguments), tangent


def _varying_as(y: jax.Array, operands: Iterable[jax.Array]) -> jax.Array:
    """Inside a shard_map that tracks it, y varies over the mesh axes that an operand varies over."""
    axes = frozenset().union(*(jax.typeof(operand).mat.varying for operand in operands))
    return lax.pcast(y, tuple(axes), to="varying") if axes else y


def unsupported(arguments: Arguments, w: str = "w", axes: str = "DN") -> Refusal | None:
    """Why the kernel cannot take these arguments; None if it can. `w` and `axes` are what the op calls the weight, and
    those along and beside which it is multiplied."""
    shape, w_shape = Shape.of(arguments), arguments.w.shape
    if shape.dtype not in (jnp.bfloat16, jnp.float16):
        return Refusal("x.dtype", shape.dtype, "bfloat16, float16, which the tensor cores take")
    if shape.tokens > MAX_TOKENS:
        return Refusal("x.shape", arguments.x.shape, f"at most {MAX_TOKENS} tokens")
    if shape.hidden % 64 or shape.hidden < 128:
        return Refusal(f"{w}.shape", w_shape, f"{axes[0]} a multiple of 64, from 128")
    if shape.outputs % 64:
        return Refusal(f"{w}.shape", w_shape, f"{axes[1]} a multiple of 64")
    if shape.norm_dtype is not None and shape.dtype == jnp.float16:
        why = "x times its scale, before the norm divides it, may exceed float16"
        return Refusal("norm_scale", "an array", f"None where x is float16: {why}")
    if smem_bytes((config_for(shape), shape)) > SHARED_BYTES:
        beside = "shared memory for two tiles of the weight beside the norm's scale"
        return Refusal(f"{w}.shape", w_shape, f"a {axes[0]} that leaves {beside}")
    return None


@partial(jax.jit, static_argnames=("config",))
def streaming_mlp(arguments: MLPArguments, *, config: MLPConfig | None = None) -> jax.Array:
    """See the public op; `unsupported_mlp` says what this one does not take."""
    return _in_groups_of_8(partial(_row, config), arguments)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _row(config: MLPConfig | None, arguments: MLPArguments) -> jax.Array:
    row = products(arguments)
    shapes = [Shape.of(product) for product in row]
    config = config or mlp_config_for(shapes)
    config.check(shapes)
    launched = [
        Product(shape, each, product.norm_eps, _operands(product))
        for shape, each, product in zip(shapes, config.of(shapes), row, strict=True)
    ]
    return launch(launched, config.clusters)[-1][0]


@_row.defjvp
def _derivative_of_row(
    config: MLPConfig | None, primals: tuple[MLPArguments], tangents: tuple[MLPArguments]
) -> tuple[Any, Any]:
    """That of the same function in plain XLA."""
    (arguments,) = primals
    _, tangent = jax.jvp(partial(compose, xla.streaming_matmul), primals, tangents)
    return _row(config, arguments), tangent


def unsupported_mlp(arguments: MLPArguments) -> Refusal | str | None:
    """Why the kernel cannot take these arguments; None if it can."""
    if (found := dispatch.multiprocessors()) < MULTIPROCESSORS:
        least = f"at least {MULTIPROCESSORS}, since all blocks wait for each other"
        return f"this GPU has {found} multiprocessors; {least}"
    if arguments.tokens > MAX_TOKENS_OF_ROW:
        return Refusal("x.shape", arguments.x_MD.shape, f"at most {MAX_TOKENS_OF_ROW} tokens")
    row = products(arguments)
    weights = {"o": "ED", "up": "DF", "down": "FD"} if len(row) == 3 else {"up": "DF", "down": "FD"}
    for product, (w, axes) in zip(row, weights.items(), strict=True):
        if refusal := unsupported(product, w, axes):
            return refusal
    return row_refusal(row, {w: axes[0] for w, axes in weights.items()})


@dataclass(frozen=True)
class Product:
    """One product of a launch; operands by name, None or the `Result` of an earlier product among them."""

    shape: Shape
    config: Config
    norm_eps: float
    operands: dict[str, jax.Array | Result | None]

    @property
    def known(self) -> Hashable:
        """All but what the arrays hold."""
        chained = ((name, array) for name, array in self.operands.items() if isinstance(array, Result))
        given = (name for name, array in self.operands.items() if isinstance(array, jax.Array))
        return self.shape, self.config, self.norm_eps, *chained, *given

    @property
    def buffers(self) -> dict[str, Buffer]:
        return buffers(self.config, self.shape)

    @property
    def results(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The result, and partial sums that meet in device memory, by cluster, owner and part."""
        shape, config = self.shape, self.config
        found = {"out": jax.ShapeDtypeStruct((shape.groups, shape.tokens, shape.outputs), shape.out_dtype)}
        if config.split > 1 and config.exchange == "gmem":
            owners = config.owners(shape)
            leading = (config.clusters(shape), owners, config.split)
            rows = {"products": config.tile_n} | ({} if shape.norm_dtype is None else {"squares": ROWS})
            for name, n in rows.items():
                found[name] = jax.ShapeDtypeStruct((*leading, n, shape.padded_tokens // owners), jnp.float32)
        return found


def launch(products: Sequence[Product], clusters: int) -> list[jax.Array]:
    """Computes the products in one kernel, one after the other; the result of each, out_AMN."""
    operands = {
        (i, name): array
        for i, product in enumerate(products)
        for name, array in product.operands.items()
        if isinstance(array, jax.Array)
    }
    results = {(i, name): result for i, product in enumerate(products) for name, result in product.results.items()}
    # A counter for each meeting and one for leaving the last, which every launch leaves at zero.
    counters = [] if len(products) == 1 else [jnp.zeros(len(products), jnp.int32)]
    cluster = max(product.config.split for product in products)

    names = [*("counters" for _ in counters), *operands, *results]

    def body(*refs: Any) -> None:
        *arrays, shared, own = refs
        gmem = dict(zip(names, arrays, strict=True))
        views = [_view(i, product, gmem) for i, product in enumerate(products)]
        memories = [SimpleNamespace(**_memory(products, i, shared, own)) for i in range(len(products))]
        run(
            [
                Block(product.shape, product.config, product.norm_eps, clusters, clusters * cluster, view, memory)
                for product, view, memory in zip(products, views, memories, strict=True)
            ]
        )

    call = plgpu.kernel(
        body,
        out_type=tuple(results.values()),
        grid=(clusters,),
        grid_names=("cluster",),
        cluster=(cluster,),
        cluster_names=("part",),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=(_shared(products), [_own(product) for product in products]),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="streaming_matmul",
    )
    key = ("streaming_matmul", clusters, *(product.known for product in products))
    found = dict(zip(results, once(call, key, *counters, *operands.values()), strict=True))
    return [_varying_as(found[i, "out"], operands.values()) for i in range(len(products))]


def _view(i: int, product: Product, gmem: dict[Any, Ref]) -> SimpleNamespace:
    """Product `i`'s arrays in device memory, by name; None for those that it has not."""

    def ref(name: str, array: jax.Array | Result | None) -> Ref | None:
        return gmem[array.index, "out"] if isinstance(array, Result) else gmem.get((i, name))

    operands = {name: ref(name, array) for name, array in product.operands.items()}
    results = {name: gmem[i, name] for name in product.results}
    return SimpleNamespace(**operands, **results, counters=gmem.get("counters"))


def _operands(arguments: Arguments) -> dict[str, jax.Array | Result | None]:
    """The kernel's inputs by name, with an axis of one group or one expert where there are none."""

    def leading(array: jax.Array | Result | None) -> jax.Array | Result | None:
        return array if not isinstance(array, jax.Array) or arguments.of_experts else array[None]

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


def _shared(products: Sequence[Product]) -> dict[str, Any]:
    """What the products of a launch use one after the other: a ring of tiles, in whatever shape; and other buffers and
    barriers that they have in common."""

    def allocate(buffer: Buffer) -> Any:
        return plgpu.SMEM(buffer.shape, buffer.dtype, transforms=OPERAND if buffer.operand else ())

    first, of_cluster = products[0], plgpu.ClusterBarrier(collective_axes=("part",))
    copies = Tiles.of(first.shape.w_axes, first.config).copies
    barriers: dict[str, Any] = {"w_loaded": plgpu.Barrier(num_arrivals=copies, num_barriers=first.config.stages)}
    if len(products) > 1:
        if any(product.config.split > 1 for product in products):
            barriers["inbox_free"] = of_cluster
        if first.config.exchange == "gmem":
            barriers["met"] = of_cluster
    # To the interpreter, accesses to a union are to the same bytes of it, wherever they are.
    rings = [allocate(buffer) for buffer in _rings(products)]
    return {
        "rings": rings if first.config.exchange == "gmem" else plgpu.RefUnion(*rings),
        "rest": [allocate(buffer) for _, buffer in _rest(products)],
        "barriers": barriers,
    }


def _memory(products: Sequence[Product], i: int, shared: dict[str, Any], own: list[dict[str, Any]]) -> dict[str, Ref]:
    """The buffers and barriers of product `i`, by name."""
    rest = dict(zip(_rest(products), shared["rest"], strict=True))
    buffers = products[i].buffers
    found = {name: rest[name, buffer] for name, buffer in buffers.items() if name != "w"}
    return shared["barriers"] | own[i] | found | {"w": shared["rings"][_rings(products).index(buffers["w"])]}


def _rings(products: Sequence[Product]) -> list[Buffer]:
    return list(dict.fromkeys(product.buffers["w"] for product in products))


def _rest(products: Sequence[Product]) -> list[tuple[str, Buffer]]:
    every = (item for product in products for item in product.buffers.items())
    return list(dict.fromkeys((name, buffer) for name, buffer in every if name != "w"))


def _own(product: Product) -> dict[str, Any]:
    """The barriers of one product of a launch: how many arrivals they count depends on it."""
    config, shape = product.config, product.shape
    barriers: dict[str, Any] = {
        "x_loaded": plgpu.Barrier(num_arrivals=config.pieces, num_barriers=config.stages),
    }
    if shape.norm_dtype is not None:
        barriers["scale_loaded"] = plgpu.Barrier()
    if extras := (shape.bias_dtype is not None) + (shape.residual_dtype is not None):
        barriers["extras_loaded"] = plgpu.Barrier(num_arrivals=extras)
    if config.split > 1:
        sums = 1 + (shape.norm_dtype is not None)
        barriers["received"] = (
            plgpu.Barrier(num_arrivals=config.split * sums)
            if config.exchange == "smem"
            else plgpu.ClusterBarrier(collective_axes=("part",))
        )
    return barriers

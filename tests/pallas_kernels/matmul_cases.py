"""Small problems of the weight-streaming matmul, and what their results must be."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.streaming_matmul import streaming_matmul
from pallas_kernels.streaming_matmul.arguments import Arguments
from pallas_kernels.streaming_matmul.config import Config
from tests.pallas_kernels.draws import Normal, on_the_device

BF16, F16, F32 = (jnp.dtype(dtype) for dtype in (jnp.bfloat16, jnp.float16, jnp.float32))


@dataclass(frozen=True)
class Case:
    tokens: int
    w_axes: str
    config: Config
    extras: str = ""  # of norm, bias, residual
    hidden: int = 256
    outputs: int = 128
    experts_of_groups: tuple[int, ...] = ()  # of EXPERTS
    dtype: jnp.dtype = BF16
    out_dtype: jnp.dtype = BF16


def arguments(case: Case, normal: Normal | None = None) -> Arguments:
    """Random arguments; the scale of a norm is float32, a bias is not."""
    normal, dtype, D = normal or on_the_device(), case.dtype, case.hidden
    sizes = {"E": EXPERTS, "D": D, "c": 2, "N": case.outputs}
    groups = (len(case.experts_of_groups),) if case.experts_of_groups else ()
    bias_shape = tuple(sizes[axis] for axis in case.w_axes if axis != "D")
    return Arguments(
        normal((*groups, case.tokens, D), dtype),
        normal(tuple(sizes[axis] for axis in case.w_axes), dtype, D**-0.5),
        jnp.asarray(case.experts_of_groups, jnp.int32) if groups else None,
        normal((D,), F32, 1 / 4, 1.0) if "norm" in case.extras else None,
        normal(bias_shape, dtype) if "bias" in case.extras else None,
        normal((case.tokens, case.outputs), dtype) if "residual" in case.extras else None,
        case.w_axes,
        1e-5,
        case.out_dtype,
    )


def call(given: Arguments, implementation: str) -> jax.Array:
    return streaming_matmul(
        given.x,
        given.w,
        w_axes=given.w_axes,
        expert_A=given.expert_A,
        norm_scale_D=given.norm_scale_D,
        norm_eps=given.norm_eps,
        bias=given.bias,
        residual_MN=given.residual_MN,
        out_dtype=given.out_dtype,
        implementation=implementation,
    )


def oracle(given: Arguments) -> tuple[np.ndarray, np.ndarray]:
    """The result in float64, and how far from it rounding may lead.

    What the tensor cores take of a normed x is rounded to u = 2^-8 or 2^-11 of it at most, half of that on the mean;
    D sums in float32 add D * 2^-24 of the magnitudes; the result is rounded once.
    """
    x, w = (np.asarray(array, np.float64) for array in (given.x, given.w))
    bias = None if given.bias is None else np.asarray(given.bias, np.float64)
    if given.expert_A is not None:
        w = w[np.asarray(given.expert_A)]
        bias = None if bias is None else bias[np.asarray(given.expert_A)][:, None]
    unit = float(jnp.finfo(given.x.dtype).eps) / 2 if given.norm_scale_D is not None else 0.0
    if given.norm_scale_D is not None:
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + given.norm_eps) * np.asarray(given.norm_scale_D, np.float64)
    y = np.einsum(given.product, x, w, optimize=True)
    bound = (unit + x.shape[-1] * 2.0**-24) * np.einsum(given.product, abs(x), abs(w), optimize=True)
    if bias is not None:
        y = y + bias
    if given.gated:
        (gate, up), (gate_bound, up_bound) = (np.moveaxis(array, -2, 0) for array in (y, bound))
        silu = gate / (1 + np.exp(-gate))
        bound = 1.1 * gate_bound * (abs(up) + up_bound) + abs(silu) * up_bound  # |silu'| < 1.1
        y = silu * up
    if given.residual_MN is not None:
        y = y + np.asarray(given.residual_MN, np.float64)
    return y, bound + (abs(y) + bound) * max(float(jnp.finfo(given.out_dtype).eps) / 2, 2.0**-20)


def assert_close(found: jax.Array, given: Arguments) -> None:
    exact, bound = oracle(given)
    assert found.dtype == given.out_dtype
    excess = abs(np.asarray(found, np.float64) - exact) - bound
    assert excess.max() <= 0, f"{excess.max()} beyond the bound at {np.unravel_index(excess.argmax(), excess.shape)}"


def root_mean_square(error: np.ndarray) -> float:
    return float(np.sqrt((error**2).mean()))


def floats(*shape: int, dtype: jnp.dtype = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def evaluate(op: Callable[..., jax.Array], given: dict[str, Any]) -> jax.ShapeDtypeStruct:
    """The shape of what an op returns for arguments of these shapes, and options; nothing runs."""
    arrays = {name: value for name, value in given.items() if isinstance(value, jax.ShapeDtypeStruct)}
    static = {name: value for name, value in given.items() if name not in arrays}
    return jax.eval_shape(lambda arrays: op(**arrays, **static), arrays)


SMALL = Config(tile_n=128, tile_d=64, stages=2)
# The interpreter knows no shared memory of another block: there the partial sums meet in device memory.
PARTS = Config(tile_n=128, tile_d=64, stages=2, split=2, exchange="gmem")
EXPERTS = 3

INTERPRETED = {
    "one token, three stages": Case(1, "DN", replace(SMALL, stages=3), "norm"),
    "tiles in rounds, a ragged one": Case(3, "DN", replace(SMALL, tile_n=64, rounds=2), "bias residual", 320, 192),
    "output head": Case(3, "ND", replace(SMALL, tile_d=128), "norm", out_dtype=F32),
    "gated, in rounds": Case(8, "DcN", replace(SMALL, rounds=2), "norm bias residual", outputs=192),
    "groups of two experts": Case(1, "EDcN", replace(SMALL, rounds=2), "norm", 128, 64, experts_of_groups=(2, 0)),
    "groups of one expert": Case(8, "EDN", SMALL, "bias", 128, experts_of_groups=(1, 1)),
    "parts of a normed head, past the end of D": Case(8, "ND", PARTS, "norm bias", 320),
    "parts, tokens of several owners": Case(20, "DcN", PARTS, "norm residual", outputs=64),
    "three parts, two owners": Case(64, "DN", replace(PARTS, split=3), "norm bias residual", 384, 64),
    "three parts, two clusters": Case(64, "DN", replace(PARTS, split=3), "norm bias", 384, 256, out_dtype=F32),
    "float16": Case(64, "ND", replace(SMALL, tile_n=64), "bias residual", 128, dtype=F16, out_dtype=F16),
}
# With these, and the weights of Llama-3-8B, every two options meet: see test_gpu_cases.py.
CLUSTER = replace(PARTS, exchange="smem")
HALF = {"dtype": F16, "out_dtype": F32}
TWO_EXPERTS = {"experts_of_groups": (2, 0)}
PAIRED = {
    "ND, few tokens, residual": Case(5, "ND", CLUSTER, "residual"),
    "END, few tokens, norm": Case(3, "END", SMALL, "norm", **TWO_EXPERTS),
    "EDN, two owners, norm, bias": Case(64, "EDN", CLUSTER, "norm bias", 384, out_dtype=F32, **TWO_EXPERTS),
    "DN, float16": Case(12, "DN", PARTS, **HALF),
    "DcN, float16, several owners, residual": Case(20, "DcN", CLUSTER, "residual", **HALF),
    "EDN, float16, one token": Case(1, "EDN", PARTS, **HALF, **TWO_EXPERTS),
    "END, float16, one token, bias": Case(1, "END", CLUSTER, "bias", **HALF, **TWO_EXPERTS),
    "END, float16, bias": Case(16, "END", PARTS, "bias", **HALF, **TWO_EXPERTS),
    "EDcN, float16, few tokens, bias": Case(7, "EDcN", PARTS, "bias", **HALF, **TWO_EXPERTS),
    "EDcN, float16, bias": Case(16, "EDcN", CLUSTER, "bias", **HALF, **TWO_EXPERTS),
}

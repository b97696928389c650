"""Products of activations and weights, with the operations around them that a kernel can take in.

A few tokens times a weight is one kernel, `streaming_matmul`, with its norm, bias, gate and residual, where the op
says that it runs and is faster: this is known from shapes when the step is traced. Many tokens are one too,
`tiled_matmul`, with gate and residual. Elsewhere each is its own operation, in plain jax.numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxinfer.parallel import (
    TENSOR,
    all_tokens,
    column_parallel,
    column_parallel_ring,
    goes_round,
    round_trip,
    row_axis,
    row_parallel,
    whole,
)
from pallas_kernels.streaming_matmul import streaming_matmul, streaming_mlp, takes, takes_mlp
from pallas_kernels.tiled_matmul import takes_many, tiled_matmul

RMS = tuple[jax.Array, float]  # scale_D and epsilon
Weight = tuple[jax.Array, jax.Array | None]  # with its bias
Op = Callable[..., jax.Array]  # of few tokens or of many


class Norm(Protocol):
    """What stands before a product."""

    def __call__(self, x_TD: jax.Array) -> jax.Array: ...

    @property
    def rms(self) -> RMS | None:
        """Scale and epsilon where the norm is an RMSNorm and nothing more."""
        ...


def einsum(spec: str, x: jax.Array, w: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """`jnp.einsum(spec, x, w)` of activations and a weight; the result is in `dtype`, by default that of `x`."""
    return jnp.einsum(spec, x, w, preferred_element_type=dtype or x.dtype)


def reduce_einsum(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`einsum` of one token, [1, D], and a weight whose first axis is contracted, by multiplying and adding.

    XLA fuses the slice that picks an expert's weight into this. For a matmul it copies the slice first: the two
    experts of one token of Mixtral take 0.57 ms with `einsum` and 0.28 ms so (one H200, bfloat16).
    """
    assert x.shape == (1, w.shape[0]), (spec, x.shape, w.shape)
    x_D = x.astype(jnp.float32).reshape(-1, *(1,) * (w.ndim - 1))
    return (x_D * w.astype(jnp.float32)).sum(axis=0, keepdims=True).astype(x.dtype)


def project(
    spec: str, x_TD: jax.Array, w: jax.Array, bias: jax.Array | None = None, norm: Norm | None = None
) -> jax.Array:
    """norm(x) @ w + bias, sharded as w is.

    Args:
        spec: such as "TD,DKgH->TKgH". The first axis of w is D; any other may be sharded.
        bias: of the shape of w without D.
    """
    x_TD, rms = _before(norm, x_TD, w, "DN")
    out_spec = P(None, *jax.typeof(w).sharding.spec[1:])
    if (op := _op(x_TD, w, bias, rms, "DN")) is not None:
        return _on_own_columns(op, x_TD, w, bias, rms, "DN", out_spec)
    return _of_all_tokens(partial(_plain, spec), (w, bias), x_TD, out_spec)


def gated_silu(
    x_TD: jax.Array, w_DcF: jax.Array, bias_cF: jax.Array | None = None, norm: Norm | None = None
) -> jax.Array:
    """SiLU(y[:, 0]) * y[:, 1] of y_TcF = norm(x) @ w + bias: [T, F], sharded over F."""
    x_TD, rms = _before(norm, x_TD, w_DcF, "DcN")
    if (op := _op(x_TD, w_DcF, bias_cF, rms, "DcN")) is not None:
        return _on_own_columns(op, x_TD, w_DcF, bias_cF, rms, "DcN", P(None, TENSOR))
    return _of_all_tokens(_gated, (w_DcF, bias_cF), x_TD, P(None, TENSOR))


def contract(
    spec: str, x_TF: jax.Array, w_FD: jax.Array, bias_D: jax.Array | None = None,
    residual_TD: jax.Array | None = None, like_TD: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """residual + (x @ w + bias), x and w sharded over F.

    One device's kernel adds bias and residual itself; of several, what adds up their products adds the residual.

    Args:
        like_TD: has its tokens where those of the result are to be, and those of the residual are; without it all are
            on every device.
    """
    multiply = None
    if row_axis(x_TF) is None:
        if _local(w_FD).shape == w_FD.shape and (op := _op_of_all(x_TF, w_FD, bias_D, residual_TD)) is not None:
            return whole(partial(_finished, op), x_TF, w_FD, bias_D, residual_TD)
        multiply = _op_of_all(_local(x_TF), _local(w_FD))
    multiply = multiply or partial(einsum, spec)
    return _added(lambda residual_TD: row_parallel(multiply, x_TF, w_FD, residual_TD, like_TD), bias_D, residual_TD)


def output_and_gated_mlp(
    heads_TM: jax.Array, o_MD: jax.Array, x_TD: jax.Array, norm: Norm, up_DcF: jax.Array, down_FD: jax.Array
) -> jax.Array | None:
    """h + SiLU-gated MLP of norm(h), h = x + heads @ o: a layer from its heads on, in one kernel.

    None where no kernel does all of it: the caller then has its products to call.
    """
    weights = (o_MD, up_DcF, down_FD)
    if row_axis(x_TD) is not None or norm.rms is None or any(_local(w).shape != w.shape for w in weights):
        return None
    scale_D, eps = norm.rms
    if not takes_mlp(x_TD, up_DcF, down_FD, norm_scale_D=scale_D, attended_ME=heads_TM, o_ED=o_MD):
        return None

    def local(heads_TM, o_MD, x_TD, scale_D, up_DcF, down_FD):
        return streaming_mlp(
            x_TD, up_DcF, down_FD, norm_scale_D=scale_D, norm_eps=eps, attended_ME=heads_TM, o_ED=o_MD
        )

    return whole(local, heads_TM, o_MD, x_TD, scale_D, up_DcF, down_FD)


def mlp_ring(
    activate: Callable[[jax.Array], jax.Array], x_TD: jax.Array, up: Weight, down: Weight, norm: Norm | None,
    residual_TD: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """residual + down(activate(up(norm(x)))), where the tokens of x go round a ring.

    Args:
        activate: [T, c, F] to [T, F].
        up, down: weight and bias, [D, c, F] and [F, D], sharded over F.
    """
    (down_FD, down_bias_D), x_TD = down, x_TD if norm is None else norm(x_TD)

    def to_inner(up: Weight, x_tD: jax.Array) -> jax.Array:
        return activate(_plain("TD,DcF->TcF", up, x_tD))

    trip = partial(round_trip, to_inner, up, partial(einsum, "TF,FD->TD"), down_FD, x_TD)
    return _added(trip, down_bias_D, residual_TD)


def _before(norm: Norm | None, x_TD: jax.Array, w: jax.Array, w_axes: str) -> tuple[jax.Array, RMS | None]:
    """What the product takes: x and a norm to take in, or the normed x; all tokens of it, whose norm is then done, or,
    where they go round a ring, each device's part."""
    if goes_round(x_TD):
        return x_TD if norm is None else norm(x_TD), None
    if norm is None:
        return all_tokens(x_TD), None
    if (rms := norm.rms) is not None and _takes(x_TD, w, w_axes, rms):
        return all_tokens(x_TD), rms
    return all_tokens(norm(x_TD)), None


def _takes(x_TD: jax.Array, w: jax.Array, w_axes: str, rms: RMS | None) -> bool:
    few = row_axis(x_TD) is None  # tokens are spread where there are many
    return few and takes(x_TD, _local(w, w_axes), w_axes=w_axes, norm_scale_D=None if rms is None else rms[0])


def _op(x_TD: jax.Array, w: jax.Array, bias: jax.Array | None, rms: RMS | None, w_axes: str) -> Op | None:
    """What is one kernel for a product with columns of w, x as `_before` gives it; None where nothing is."""
    if _takes(x_TD, w, w_axes, rms):
        return streaming_matmul
    plain = rms is None and bias is None and row_axis(x_TD) is None
    return tiled_matmul if plain and takes_many(x_TD, _local(w, w_axes), w_axes=w_axes) else None


def _op_of_all(x_TF: Any, w_FD: Any, bias_D: Any = None, residual_TD: Any = None) -> Op | None:
    """What is one kernel for a product of all that one device holds; None where nothing is."""
    if takes(x_TF, w_FD, bias=bias_D, residual_MN=residual_TD):
        return streaming_matmul
    return tiled_matmul if bias_D is None and takes_many(x_TF, w_FD, residual_MN=residual_TD) else None


def _on_own_columns(
    op: Op, x_TD: jax.Array, w: jax.Array, bias: jax.Array | None, rms: RMS | None, w_axes: str, out_spec: P
) -> jax.Array:
    scale_D, eps = rms or (None, None)

    def local(columns: tuple[jax.Array, jax.Array | None], x_TD: jax.Array, scale_D: jax.Array | None) -> jax.Array:
        w, bias = columns
        shape = _shape(w.shape, w_axes)
        if bias is not None:
            bias = bias.reshape(shape[1:])
        y = op(x_TD, w.reshape(shape), w_axes=w_axes, **_given(norm_scale_D=scale_D, norm_eps=eps, bias=bias))
        return y if w_axes == "DcN" else y.reshape(-1, *w.shape[1:])

    return column_parallel(local, out_spec, (w, bias), x_TD, scale_D)


def _added(
    product: Callable[[jax.Array | None], jax.Array], bias_D: jax.Array | None, residual_TD: jax.Array | None
) -> jax.Array:
    """residual + (product + bias), of a product that adds a residual itself where no bias is to come first."""
    if bias_D is None:
        return product(residual_TD)
    y_TD = product(None) + bias_D[None, :]
    return y_TD if residual_TD is None else residual_TD + y_TD


def _finished(
    op: Op, x_TF: jax.Array, w_FD: jax.Array, bias_D: jax.Array | None, residual_TD: jax.Array | None
) -> jax.Array:
    return op(x_TF, w_FD, **_given(bias=bias_D, residual_MN=residual_TD))


def _given(**options: Any) -> dict[str, Any]:
    """Those that there are."""
    return {name: option for name, option in options.items() if option is not None}


def _of_all_tokens(
    product: Callable[[Weight, jax.Array], jax.Array], columns: Weight, x_TD: jax.Array, out_spec: P
) -> jax.Array:
    """The product of x as `_before` gives it."""
    around = goes_round(x_TD)
    return column_parallel_ring(product, out_spec, columns, x_TD) if around else product(columns, x_TD)


def _gated(columns: Weight, x_TD: jax.Array) -> jax.Array:
    up_TcF = _plain("TD,DcF->TcF", columns, x_TD)
    return jax.nn.silu(up_TcF[:, 0]) * up_TcF[:, 1]


def _plain(spec: str, columns: Weight, x_TD: jax.Array) -> jax.Array:
    w, bias = columns
    y = einsum(spec, x_TD, w)
    return y if bias is None else y + bias[None]


def _local(array: jax.Array, w_axes: str | None = None) -> jax.ShapeDtypeStruct:
    """What one device holds of an array, as a kernel with such axes takes it."""
    sharding = jax.typeof(array).sharding  # its own `shard_shape` fails within a stage of a pipe
    names = [axis if isinstance(axis, tuple) else (axis,) if axis else () for axis in sharding.spec]
    ways = [math.prod(sharding.mesh.shape[name] for name in axis) for axis in names]
    shape = tuple(size // way for size, way in zip(array.shape, ways, strict=True))
    return jax.ShapeDtypeStruct(_shape(shape, w_axes) if w_axes else shape, array.dtype)


def _shape(shape: tuple[int, ...], w_axes: str) -> tuple[int, ...]:
    """All columns of a weight are one axis to a kernel, unless they are a gate's and an up projection's."""
    return (shape[0], math.prod(shape[1:])) if w_axes == "DN" else shape

"""A few tokens times a large weight: bound by the bytes of the weight, which are read once."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.checks import require_numbers
from pallas_kernels.streaming_matmul import mosaic_gpu, reference, xla
from pallas_kernels.streaming_matmul.arguments import Arguments, check, result_dtype
from pallas_kernels.streaming_matmul.config import Shape, slower
from pallas_kernels.streaming_matmul.mlp import MLPArguments, check_mlp, compose

NAME = "streaming_matmul"
MLP = "streaming_mlp"
IMPLEMENTATIONS = {
    "mosaic_gpu": mosaic_gpu.streaming_matmul,
    "xla": xla.streaming_matmul,
    "reference": reference.streaming_matmul,
}
MLP_IMPLEMENTATIONS = {
    "mosaic_gpu": mosaic_gpu.streaming_mlp,
    "xla": partial(compose, xla.streaming_matmul),
    "reference": partial(compose, reference.streaming_matmul),
}


def streaming_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    w_axes: str = "DN",
    expert_A: jax.Array | None = None,
    norm_scale_D: jax.Array | None = None,
    norm_eps: float = 1e-6,
    bias: jax.Array | None = None,
    residual_MN: jax.Array | None = None,
    out_dtype: jnp.dtype | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Multiplies M tokens by a weight, with the norm before it and what follows it.

        y = norm(x) @ w + bias, for a gated weight SiLU(y_gate) * y_up; plus the residual.

    Args:
      x: x_MD, float32, bfloat16 or float16; for a weight of experts x_AMD, A groups of M tokens.
      w: in the dtype of x and in the order `w_axes`: "DN"; "ND", multiplied along its last axis (an output head stored
        by vocabulary); "DcN", c = 2, the gate first: the result is then gated. "EDN", "END", "EDcN" hold one such
        weight for each expert.
      expert_A: int32, the expert of each group. Only the weights of these are read.
      norm_scale_D: RMSNorm of x over D with this scale (Gemma's is one plus its parameter) and `norm_eps`.
      bias: bias_N, or bias_cN of a gated weight, with E in front for experts; added to the product.
      residual_MN: added last, not for experts. Scale, bias and residual are float32, bfloat16 or float16 each.
      out_dtype: of the result, by default that of x.
      implementation: "mosaic_gpu" (Hopper; bfloat16, or float16 without a norm; M up to 64, D and N multiples of 64),
        "xla", "reference", or "auto": the kernel on what it takes, save where XLA was measured to be faster.

    Returns:
      y_MN, or y_AMN. The kernel accumulates and finishes in float32 and rounds once; norm and scale multiply x in
      float32, and the tensor cores take x times the scale in the dtype of x. XLA rounds the product to it before the
      epilogue.

    Raises:
      ValueError: names the argument, what it is and what is allowed; before any device work.

    Differentiable; the derivative of the kernel is that of XLA.

    Source: split of the contraction over blocks as in Stream-K (Osama et al. 2023), of equal parts.
    """
    dtype = result_dtype(x, out_dtype)
    arguments = Arguments(x, w, expert_A, norm_scale_D, bias, residual_MN, w_axes, norm_eps, dtype)
    check(arguments)
    require_numbers(x=x, w=w, expert=expert_A, norm_scale=norm_scale_D, bias=bias, residual=residual_MN)
    refusal = mosaic_gpu.unsupported(arguments)
    if implementation == "auto":
        refusal = refusal or slower(Shape.of(arguments))
    run = dispatch.choose(NAME, implementation, IMPLEMENTATIONS, {dispatch.KERNEL: refusal})
    dispatch.require_here(NAME, implementation, arguments)
    return run(arguments)


def takes(
    x: Any,
    w: Any,
    *,
    w_axes: str = "DN",
    norm_scale_D: jax.Array | None = None,
    bias: jax.Array | None = None,
    residual_MN: jax.Array | None = None,
) -> bool:
    """Whether `auto` is the kernel here: for a caller who has unfused operations of his own to run where it is not.

    The arguments are those of `streaming_matmul`. Only their shapes and dtypes count: x and w may be
    `jax.ShapeDtypeStruct`.
    """
    arguments = Arguments(x, w, None, norm_scale_D, bias, residual_MN, w_axes, 0.0, result_dtype(x, None))
    check(arguments)
    refusal = mosaic_gpu.unsupported(arguments) or slower(Shape.of(arguments))
    return dispatch.preferred(NAME, {dispatch.KERNEL: refusal}) == dispatch.KERNEL


def streaming_mlp(
    x_MD: jax.Array,
    up_DcF: jax.Array,
    down_FD: jax.Array,
    *,
    norm_scale_D: jax.Array,
    norm_eps: float = 1e-6,
    attended_ME: jax.Array | None = None,
    o_ED: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """What follows attention in a layer of M tokens, as one kernel that never stops reading weights.

        h = x + attended @ o;  y = h + (SiLU(gate) * up) @ down of gate, up = norm(h) @ up_DcF

    Args:
      x_MD: the residual stream; float32, bfloat16 or float16. All weights are in its dtype.
      up_DcF: c = 2, the gate first.
      norm_scale_D: of the RMSNorm, with `norm_eps`; there is always one.
      attended_ME, o_ED: the heads' outputs and their projection; without them h = x.
      implementation: "mosaic_gpu" (Hopper; bfloat16; M up to 32; multiples of 64, D from 128 and E and F from 1024),
        "xla", "reference", or "auto".

    Returns:
      y_MD. h and the inner F are rounded to the dtype of x between the products, as by `streaming_matmul`.

    Raises:
      ValueError: names the argument, what it is and what is allowed; before any device work.
    """
    arguments = MLPArguments(x_MD, up_DcF, down_FD, norm_scale_D, attended_ME, o_ED, norm_eps)
    check_mlp(arguments)
    require_numbers(x=x_MD, up=up_DcF, down=down_FD, norm_scale=norm_scale_D, attended=attended_ME, o=o_ED)
    refusals = {dispatch.KERNEL: mosaic_gpu.unsupported_mlp(arguments)}
    run = dispatch.choose(MLP, implementation, MLP_IMPLEMENTATIONS, refusals)
    dispatch.require_here(MLP, implementation, arguments)
    return run(arguments)


def takes_mlp(
    x_MD: Any, up_DcF: Any, down_FD: Any, *, norm_scale_D: Any, attended_ME: Any = None, o_ED: Any = None
) -> bool:
    """Whether `auto` is the kernel here, as `takes` says it of one product."""
    arguments = MLPArguments(x_MD, up_DcF, down_FD, norm_scale_D, attended_ME, o_ED, 0.0)
    check_mlp(arguments)
    return dispatch.preferred(MLP, {dispatch.KERNEL: mosaic_gpu.unsupported_mlp(arguments)}) == dispatch.KERNEL

"""Many tokens times a weight: bound by the tensor cores, which nothing is to keep waiting."""

from typing import Any

import jax

from pallas_kernels import dispatch
from pallas_kernels.checks import require, require_numbers
from pallas_kernels.streaming_matmul import reference, xla
from pallas_kernels.streaming_matmul.arguments import Arguments, check, result_dtype
from pallas_kernels.tiled_matmul import mosaic_gpu
from pallas_kernels.tiled_matmul.config import Shape, slower, unsupported

NAME = "tiled_matmul"
IMPLEMENTATIONS = {
    "mosaic_gpu": mosaic_gpu.tiled_matmul,
    "xla": xla.streaming_matmul,
    "reference": reference.streaming_matmul,
}
W_AXES = ("DN", "DcN")


def tiled_matmul(
    x_MD: jax.Array,
    w: jax.Array,
    *,
    w_axes: str = "DN",
    residual_MN: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Multiplies M tokens by a weight, and gates the product or adds the residual before it leaves the chip.

        y = x @ w, for a gated weight SiLU(y_gate) * y_up; plus the residual.

    Args:
      x_MD: float32, bfloat16 or float16.
      w: in the dtype of x and in the order `w_axes`: "DN", or "DcN", c = 2, the gate first: the result is then gated.
      residual_MN: float32, bfloat16 or float16; added last.
      implementation: "mosaic_gpu" (Hopper; bfloat16 or float16, the residual in the dtype of x; D a multiple of 64, N
        of 128, or of 64 where it is gated), "xla", "reference", or "auto": the kernel on what it takes, save where XLA
        was measured to be faster.

    Returns:
      y_MN in the dtype of x. The kernel accumulates and finishes in float32 and rounds once; XLA rounds the product
      before it goes on.

    Raises:
      ValueError: names the argument, what it is and what is allowed; before any device work.

    Differentiable; the derivative of the kernel is that of XLA.
    """
    arguments = _arguments(x_MD, w, w_axes, residual_MN)
    require_numbers(x=x_MD, w=w, residual=residual_MN)
    refusal = unsupported(arguments)
    if implementation == "auto":
        refusal = refusal or slower(Shape.of(arguments))
    run = dispatch.choose(NAME, implementation, IMPLEMENTATIONS, {dispatch.KERNEL: refusal})
    dispatch.require_here(NAME, implementation, arguments)
    return run(arguments)


def takes_many(x_MD: Any, w: Any, *, w_axes: str = "DN", residual_MN: Any = None) -> bool:
    """Whether `auto` is the kernel here: for a caller who has unfused operations of his own to run where it is not.

    The arguments are those of `tiled_matmul`. Only their shapes and dtypes count: they may be `jax.ShapeDtypeStruct`.
    """
    arguments = _arguments(x_MD, w, w_axes, residual_MN)
    refusal = unsupported(arguments) or slower(Shape.of(arguments))
    return dispatch.preferred(NAME, {dispatch.KERNEL: refusal}) == dispatch.KERNEL


def _arguments(x_MD: Any, w: Any, w_axes: str, residual_MN: Any) -> Arguments:
    require(w_axes in W_AXES, "w_axes", repr(w_axes), ", ".join(W_AXES))
    arguments = Arguments(x_MD, w, None, None, None, residual_MN, w_axes, 0.0, result_dtype(x_MD, None))
    check(arguments)
    return arguments

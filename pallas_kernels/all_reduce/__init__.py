"""The sum over devices of what each holds, with the residual and the norm that follow it, in one kernel."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.all_reduce import mosaic_gpu, reference, xla
from pallas_kernels.all_reduce.arguments import Arguments, Reduced, check
from pallas_kernels.all_reduce.config import most_rows, slower
from pallas_kernels.all_reduce.workspace import Workspace, fresh_workspace, in_order, new_workspace

__all__ = [
    "Reduced",
    "Workspace",
    "all_reduce",
    "fresh_workspace",
    "in_order",
    "most_rows",
    "new_workspace",
    "runs",
]

NAME = "all_reduce"
IMPLEMENTATIONS = {
    "mosaic_gpu": mosaic_gpu.all_reduce,
    "xla": xla.all_reduce,
    "reference": reference.all_reduce,
}


def all_reduce(
    partial_TD: jax.Array,
    axis: str,
    *,
    residual_TD: jax.Array | None = None,
    norm_scale_D: jax.Array | None = None,
    norm_eps: float = 1e-6,
    workspace: Workspace | None = None,
    first: bool = False,
    implementation: str = "auto",
) -> Reduced:
    """Adds up what the devices of a mesh axis hold; called inside a `shard_map`, where each has its own `partial_TD`.

        out = residual + sum over devices of partial;  normed = RMSNorm(out) * scale

    Args:
      partial_TD: T tokens of D numbers, float32, bfloat16 or float16.
      axis: of the mesh; the `shard_map` must be manual over it.
      residual_TD: the same on every device, as is the scale; both float32, bfloat16 or float16.
      norm_scale_D: of the RMSNorm, with `norm_eps`; without it there is no norm.
      workspace: memory of these devices for messages of this D and dtype and at least T rows, from `new_workspace`, or
        from `fresh_workspace` in the same program. The kernel writes to it, although it is an argument: see there.
        Without one the kernel takes fresh memory for this call.
      first: whether this is the first use of a fresh workspace. All devices then meet before the launch, which is
        another launch. The later ones must depend on what this one gives.
      implementation: "mosaic_gpu" (Hopper GPUs of one process, all of them in the mesh; D a multiple of 128 up to
        8192), "xla", "reference", or "auto": the kernel on what it takes, up to the size of a message from which
        XLA's is faster.

    Returns:
      out_TD in the dtype of partial, and normed_TD in it too, or None without a norm; the same bits on all devices.
      The kernel adds in float32, in the order of the devices, and rounds once; XLA sums in the dtype of partial. The
      norm is that of the rounded out.

    Raises:
      ValueError: names the argument, what it is and what is allowed; before any device work.
    """
    meets = first or workspace is None
    arguments = Arguments(partial_TD, residual_TD, norm_scale_D, workspace, axis, norm_eps, meets)
    check(arguments)
    refusal = mosaic_gpu.unsupported(arguments)
    if implementation == "auto":
        refusal = refusal or slower(arguments)
    run = dispatch.choose(NAME, implementation, IMPLEMENTATIONS, {dispatch.KERNEL: refusal})
    return run(arguments)


def runs(axis: str, hidden: int, dtype: jnp.dtype) -> bool:
    """Whether `auto` is the kernel for messages of one token: for a caller who makes a workspace where it is.

    Called inside a `shard_map`, as the op.
    """
    row = jax.ShapeDtypeStruct((1, hidden), dtype)
    asked = Arguments(row, None, None, None, axis, 0.0, True)  # pyright: ignore[reportArgumentType]
    refusal = mosaic_gpu.unsupported(asked) or slower(asked)
    return dispatch.preferred(NAME, {dispatch.KERNEL: refusal}) == dispatch.KERNEL

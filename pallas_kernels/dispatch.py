"""Which implementation of an op runs: by name, or chosen openly before the launch."""

import functools
import logging
from collections.abc import Callable, Mapping

import jax

KERNEL = "mosaic_gpu"  # the name that the kernels have among the implementations
FALLBACK = "xla"
HOPPER = "9.0"
logger = logging.getLogger("pallas_kernels")


def choose[Op: Callable](op: str, implementation: str, available: Mapping[str, Op], refusal: str | None = None) -> Op:
    """Returns the named implementation; `auto` is the kernel where it runs, else XLA, and says so once.

    Args:
      refusal: why the kernel cannot take this input, None if it can.

    Raises:
      ValueError: there is no implementation of that name, or it is the kernel and refuses.
    """
    if implementation == "auto":
        implementation = KERNEL if prefers_kernel(op, refusal) else FALLBACK
    elif implementation == KERNEL and (reason := refusal or _wrong_gpu()):
        raise ValueError(f"implementation={implementation!r} of {op} cannot run: {reason}")
    if implementation not in available:
        names = ", ".join(["auto", *available])
        raise ValueError(f"implementation={implementation!r} of {op} does not exist; allowed: {names}")
    return available[implementation]


def prefers_kernel(op: str, refusal: str | None = None) -> bool:
    """Whether `auto` stands for the kernel on this input; says so once."""
    implementation, reason = automatic(refusal)
    _log_once(op, implementation, reason)
    return implementation == KERNEL


def automatic(refusal: str | None = None) -> tuple[str, str]:
    """The implementation that `auto` stands for here, and why it is that one."""
    if jax.default_backend() != "gpu":
        return FALLBACK, f"no kernel written for the backend {jax.default_backend()!r} exists"
    reason = _wrong_gpu() or refusal
    return (FALLBACK, reason) if reason else (KERNEL, "written for this GPU")


def multiprocessors(default: int = 132) -> int:
    """Of the GPU that programs run on; `default`, those of an H100 or H200, where there is none."""
    return jax.devices()[0].core_count if jax.default_backend() == "gpu" else default


def _wrong_gpu() -> str | None:
    """Why the kernels do not run on the GPU that is there. Without one, a program may still be lowered for one."""
    if jax.default_backend() != "gpu" or (found := jax.devices()[0].compute_capability) == HOPPER:
        return None
    return f"the kernels need compute capability {HOPPER}, and this GPU has {found}"


@functools.cache
def _log_once(op: str, name: str, reason: str) -> None:
    logger.info("%s runs as %s: %s", op, name, reason)

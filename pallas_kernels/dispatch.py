"""Which implementation of an op runs: by name, or chosen openly before the launch."""

import functools
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.core

KERNEL = "mosaic_gpu"  # the name that the kernels have among the implementations
CUDNN = "cudnn"
FALLBACK = "xla"
HOPPER, AMPERE = (9, 0), (8, 0)
MULTIPROCESSORS = 132  # of an H100 or H200 (SXM)


@dataclass(frozen=True)
class Refusal:
    """Why an implementation does not take an argument that the op allows."""

    argument: str
    found: object
    allowed: str

    def __str__(self) -> str:
        return f"{self.argument} is {self.found}; allowed: {self.allowed}"

    @property
    def of_any(self) -> str:
        """The same of every such argument: what `auto` says once, whatever sizes come after."""
        return f"not with this {self.argument}; allowed: {self.allowed}"


# Why an implementation cannot take an input, None if it can, by its name: the one to be preferred first.
Refusals = Mapping[str, Refusal | str | None]
NO_REFUSALS: Refusals = {KERNEL: None, CUDNN: None}
logger = logging.getLogger("pallas_kernels")


def choose[Op: Callable](op: str, implementation: str, available: Mapping[str, Op], refusals: Refusals) -> Op:
    """Returns the named implementation; `auto` is the first of `refusals` that runs here, else XLA, and says so once.

    Raises:
      ValueError: there is no implementation of that name, or it refuses.
    """
    if implementation == "auto":
        implementation = preferred(op, refusals)
    if not isinstance(implementation, str) or implementation not in available:
        names = ", ".join(["auto", *available])
        raise ValueError(f"implementation={implementation!r} of {op} does not exist; allowed: {names}")
    if reason := refusals.get(implementation) or _wrong_gpu(implementation):
        raise ValueError(f"implementation={implementation!r} of {op} cannot run: {reason}")
    return available[implementation]


def require_here(op: str, implementation: str, *arguments: Any) -> None:
    """Of an implementation asked for by name: that it runs on what is here.

    A call that is traced is let through, since its program may be lowered for a GPU elsewhere, or be interpreted.

    Raises:
      ValueError: names the op, and says why it does not run.
    """
    traced = any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves(arguments))
    if not traced and (reason := cannot_run(implementation)):
        raise ValueError(f"implementation={implementation!r} of {op} cannot run: {reason}")


def preferred(op: str, refusals: Refusals) -> str:
    """What `auto` stands for on this input; says so once."""
    implementation, reason = automatic(refusals)
    _log_once(op, implementation, reason)
    return implementation


def automatic(refusals: Refusals = NO_REFUSALS) -> tuple[str, str]:
    """The implementation that `auto` stands for here, and why it is none of those before it, without sizes."""
    if compute_capability() is None:
        return FALLBACK, _no_gpu()
    against = []
    for name, refusal in refusals.items():
        if (reason := _wrong_gpu(name) or refusal) is None:
            return name, "; ".join(against) or "written for this GPU"
        against.append(f"{name}: {reason.of_any if isinstance(reason, Refusal) else reason}")
    return FALLBACK, "; ".join(against)


def cannot_run(implementation: str) -> str | None:
    """Why an implementation does not run on what is here, whatever it is given; None if it does.

    Where there is no NVIDIA GPU, `choose` still gives a kernel that is asked for by name, since a program may be
    lowered for a GPU elsewhere: it is running it here that `require_here` refuses.
    """
    if compute_capability() is None and implementation in NO_REFUSALS:
        return _no_gpu()
    return _wrong_gpu(implementation)


def compute_capability() -> tuple[int, int] | None:
    """Of the NVIDIA GPU that programs run on; None where there is none, and a program may still be lowered for one."""
    if jax.default_backend() != "gpu":
        return None
    numbers = re.fullmatch(r"(\d+)\.(\d+)", jax.devices()[0].compute_capability)
    return (int(numbers[1]), int(numbers[2])) if numbers else None


def _no_gpu() -> str:
    return f"no kernel written for the backend {jax.default_backend()!r} exists"


def _wrong_gpu(implementation: str) -> str | None:
    """Why an implementation does not run on the GPU that is there."""
    found = compute_capability()
    if found is None:
        return None
    here = f"and this GPU has {found[0]}.{found[1]}"
    if implementation == KERNEL and found != HOPPER:
        return f"the kernels need compute capability 9.0, {here}"
    if implementation == CUDNN and found < AMPERE:
        return f"cuDNN's attention needs compute capability 8.0, {here}"
    return None


def multiprocessors() -> int:
    """Of the GPU that programs run on; those of an H100 or H200 where there is none."""
    return jax.devices()[0].core_count if jax.default_backend() == "gpu" else MULTIPROCESSORS


@functools.cache
def _log_once(op: str, name: str, reason: str) -> None:
    logger.info("%s runs as %s: %s", op, name, reason)

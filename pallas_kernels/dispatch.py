"""Which implementation of an op runs: by name, or chosen openly before the launch."""

import functools
import logging
from collections.abc import Callable, Mapping

import jax

logger = logging.getLogger("pallas_kernels")


def choose[Op: Callable](op: str, implementation: str, available: Mapping[str, Op]) -> Op:
    """Returns the named implementation; `auto` is that of `automatic`, and says so once.

    Raises ValueError for a name that does not exist.
    """
    if implementation == "auto":
        implementation, reason = automatic()
        _log_once(op, implementation, reason)
    if implementation not in available:
        names = ", ".join(["auto", *available])
        raise ValueError(f"implementation={implementation!r} of {op} does not exist; allowed: {names}")
    return available[implementation]


def automatic() -> tuple[str, str]:
    """The implementation that `auto` stands for here, and why it is that one."""
    return "xla", f"no kernel written for the backend {jax.default_backend()!r} exists"


@functools.cache
def _log_once(op: str, name: str, reason: str) -> None:
    logger.info("%s runs as %s: %s", op, name, reason)

"""Which implementation of an op runs: by name, or chosen openly before the launch."""

import functools
import logging
from collections.abc import Callable, Mapping

import jax

logger = logging.getLogger("pallas_kernels")


def choose[Op: Callable](op: str, implementation: str, available: Mapping[str, Op]) -> Op:
    """Returns the named implementation; `auto` is the XLA one, and says so once.

    Raises ValueError for a name that does not exist.
    """
    if implementation == "auto":
        _log_once(op, "xla", jax.default_backend())
        return available["xla"]
    if implementation not in available:
        names = ", ".join(["auto", *available])
        raise ValueError(f"implementation={implementation!r} of {op} does not exist; allowed: {names}")
    return available[implementation]


@functools.cache
def _log_once(op: str, name: str, backend: str) -> None:
    logger.info("%s runs as %s: no kernel written for the backend %r exists", op, name, backend)

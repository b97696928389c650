"""What the engine and its kernels say while a command runs, on standard error: also what is no warning.

They say it to loggers of their modules' names, once each: which implementation of an op runs and why, and what times
are predicted by. A program that imports them sees that if it asks `logging` for it; a command asks here.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("jaxinfer", "pallas_kernels")


class _ToStandardError(logging.Handler):
    """To `sys.stderr` as it is then: while a progress bar is shown, its own, which prints lines above it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")  # at once: other processes write there too
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


@contextmanager
def shown(*names: str, named: str = "") -> Iterator[None]:
    """Shows what these loggers say, or those of LOGGERS, with `named` before each line; one that is shown already is
    left as it is.

    Nobody else shows it then: some libraries log by functions of `logging` that give the root logger a handler.
    """
    loggers = [one for one in map(logging.getLogger, names or LOGGERS) if not _is_shown(one)]
    before = [(one.level, one.propagate) for one in loggers]
    handler = _ToStandardError()
    handler.setFormatter(logging.Formatter(f"{named}%(message)s"))
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def _is_shown(logger: logging.Logger | None) -> bool:
    """By a handler of its own or of a logger above it."""
    if logger is None:
        return False
    return any(isinstance(handler, _ToStandardError) for handler in logger.handlers) or _is_shown(logger.parent)

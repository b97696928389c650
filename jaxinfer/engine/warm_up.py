"""Programs made ready one after the other, each counted and timed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from jaxinfer.engine.metrics import Warmed, WarmUp
from jaxinfer.machine import count_compiled

Progress = Callable[[Warmed, int], None]  # what was made ready just now, and how many there are in all

logger = logging.getLogger(__name__)


def make_ready(programs: Sequence[tuple[str, Callable[[], None]]], progress: Progress | None) -> WarmUp:
    """Runs all programs once; logs a line.

    Args:
        programs: a name, and a call that returns when the device is done.
        progress: is told each program.
    """
    warmed = []
    for name, run in programs:
        start = time.perf_counter()
        with count_compiled() as counted:
            run()
        warmed.append(Warmed(name, time.perf_counter() - start, counted.programs, counted.found))
        logger.debug("%s", warmed[-1])
        if progress is not None:
            progress(warmed[-1], len(programs))
    done = WarmUp(tuple(warmed))
    logger.info("%s", done)
    return done

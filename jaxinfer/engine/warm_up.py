"""Programs made ready one after the other, each counted and timed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from jaxinfer.engine.metrics import Warmed, WarmUp
from jaxinfer.machine import count_compiled

Progress = Callable[[Warmed, int], None]  # what was made ready just now, and how many there are in all
Work = tuple[str, Callable[[], None]]

logger = logging.getLogger(__name__)


def make_ready(work: Sequence[Work], progress: Progress | None) -> WarmUp:
    """Does all the work, which returns when the device is done; logs a line.

    Args:
        work: programs by their names.
        progress: is told each program.
    """
    warmed = []
    for name, run in work:
        start = time.perf_counter()
        with count_compiled() as counted:
            run()
        warmed.append(Warmed(name, time.perf_counter() - start, counted.programs, counted.found))
        logger.debug("%s", warmed[-1])
        if progress is not None:
            progress(warmed[-1], len(work))
    done = WarmUp(tuple(warmed))
    logger.info("%s", done)
    return done

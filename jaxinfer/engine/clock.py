"""What programs take on the device, as far as the host can know.

Programs run one after the other. Where the host waits for one it knows when that was done; where it waited for two in
a row, the second took the time between. Of any other nothing is known: it was done before the host came to read it,
which may have compiled, or was not called, meanwhile.

A step in which the host has a say, as where it checks what is proposed against a grammar, is another matter: the host
reads the one before, does its part, and only then can the device go on. It takes from one reading to the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax


class DeviceClock:
    """Of an engine whose next program is on its way when the one before is read."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._done: float | None = None  # when the last program was, if that is known
        self._read: float | None = None  # when the last program was

    def idle(self) -> None:
        """The next program does not follow the last one at once."""
        self._done = self._read = None

    def wait(self, output: Any, checked: bool = False) -> float | None:
        """Until a program has its output, a pytree of arrays; returns its seconds, if they are known.

        Args:
            checked: whether the host had a say in it, after it had read the one before.
        """
        waits = not all(array.is_ready() for array in jax.tree.leaves(output))
        jax.block_until_ready(output)
        before = self._read if checked else self._done
        self._read = now = self._now()
        self._done = now if waits else None
        return None if before is None or not (waits or checked) else now - before

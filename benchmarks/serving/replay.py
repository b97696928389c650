"""What programs of an engine take on the device, whatever the host does meanwhile.

They are noted as the engine dispatches them, and run again on the same slots and pages with some always on their way,
so that the device never waits for the host. What they take longer in the engine, the host took.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.engine.runner import Runner

AHEAD = 4  # programs on their way before the host waits for the oldest
ROUNDS = 3  # of which each program's median counts: the host may be late to see the end of one
MOVED = ("token_B", "length_B", "index_B", "active_B")  # of the slots' state, what programs change that they go by

Standing = dict[str, jax.Array]


@contextmanager
def noted(runner: Runner, name: str) -> Iterator[list[tuple[Any, ...]]]:
    """The arguments of all calls of a method of the runner within the block."""
    calls, run = [], getattr(runner, name)

    def note(*given: Any) -> Any:
        calls.append(given)
        return run(*given)

    with patch.object(runner, name, note):
        yield calls


def standing(runner: Runner) -> Standing:
    """Where the slots stand when all programs so far have run."""
    return {name: jnp.copy(getattr(runner.state, name)) for name in MOVED}


def seconds(runner: Runner, run: Callable[..., Any], calls: Sequence[tuple[Any, ...]], since: Standing) -> np.ndarray:
    """Of each noted program but the first, on the device alone.

    Args:
        runner: whose slots still have their pages; where they stand after it is of no use to anyone.
        run: the runner's method.
        since: where the slots stood before the first.
    """
    rounds = []
    for _ in range(ROUNDS):
        runner.state = replace(runner.state, **{name: jnp.copy(array) for name, array in since.items()})
        runner.wait()
        rounds.append(np.diff(_ends(run, calls)))
    return np.median(rounds, axis=0)


def _ends(run: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[float]:
    """When each program was done."""
    outputs, ends = deque[Any](), []
    for given in calls:
        if len(outputs) == AHEAD:
            ends.append(_end(outputs.popleft()))
        outputs.append(run(*given))
    return [*ends, *map(_end, outputs)]


def _end(output: Any) -> float:
    jax.block_until_ready(output)
    return time.perf_counter()

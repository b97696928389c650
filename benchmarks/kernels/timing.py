"""Seconds of one call: a jitted program of 20 calls on rotated arguments, divided by 20, launch gaps included.

The arguments of consecutive calls are different copies, enough of them that twice the L2 cache passes between two
calls on the same one: K and V, or a weight, come from memory, as in a model whose layers each have their own.
A sample is as many programs as fill a few milliseconds, dispatched back to back, with one wait at the end. Nothing is
subtracted. A program that the device runs faster than the host dispatches it would show the host's time.

Triton's do_bench, with which other systems are often timed, overwrites the L2 before each call and puts events around
single launches: its gaps are those between a launch and an event, ours those within a compiled program.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from benchmarks.kernels.op import Arguments, Run

CALLS = 20
MOST_BYTES = 2**34  # of all copies
FEWEST_SAMPLES = 3


@dataclass(frozen=True)
class Effort:
    """Samples of a timing, the least seconds that one of them takes, and about the most that they take together.

    The last makes samples fewer, but never fewer than FEWEST_SAMPLES: XLA's attention to 32,768 keys takes seconds for
    one program.
    """

    samples: int = 10
    seconds: float = 0.02
    most_seconds: float = 3.0


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of the samples, their range, and how many there are."""

    median: float
    low: float
    high: float
    samples: int


class Started(NamedTuple):
    """A run that is being compiled, by other threads: timing waits until they are done."""

    prepare: Future[Callable[[Arguments], Arguments]] | None
    program: Future[Callable[[Sequence[Arguments]], list[jax.Array]]]


def start(run: Run, shapes: Arguments, pool: Executor) -> Started:
    """Traces a run here, which Python does no faster in many threads, and compiles it in the pool."""
    prepare = None
    if run.prepare is not None:
        prepare = compiled(run.prepare, shapes, pool)
        shapes = jax.eval_shape(run.prepare, shapes)
    return Started(prepare, compiled(make_program(run), [shapes] * CALLS, pool))


def compiled(function: Callable, shapes: Any, pool: Executor) -> Future:
    return pool.submit(jax.jit(function).lower(shapes).compile)


def num_copies(copy_bytes: int, l2: float) -> int:
    """Copies to rotate through: a divisor or a multiple of CALLS, so that every program is a whole number of turns.

    Between two calls on one copy the others pass, 2 * l2 bytes at least. A copy that is too large to be held twice is
    so much larger than the cache that it displaces itself.
    """
    if 2 * copy_bytes > MOST_BYTES:
        return 1
    needed = 1 + math.ceil(2 * l2 / copy_bytes)
    divisors = [n for n in range(2, CALLS + 1) if CALLS % n == 0]
    return next((n for n in divisors if n >= needed), math.ceil(needed / CALLS) * CALLS)


def make_copies(started: Started, generate: Callable[[jax.Array], Arguments], l2: float) -> list[Arguments]:
    """Prepared random arguments of consecutive calls, no copy like another."""

    def copy(n: int) -> Arguments:
        arguments = generate(jax.random.key(n))
        return arguments if started.prepare is None else started.prepare.result()(arguments)

    first = copy(0)
    copy_bytes = sum(array.nbytes for array in jax.tree.leaves(first))
    return jax.block_until_ready([first, *(copy(n) for n in range(1, num_copies(copy_bytes, l2)))])


def make_program(run: Run) -> Callable[[Sequence[Arguments]], list[jax.Array]]:
    """A program that calls `run` once on each of the arguments, one call after the other.

    Three things keep XLA from making less of it. Every call has parameters of its own, also where the same copy is
    passed again, so that no two calls are the same expression. Every output is returned, so that none is dropped. And
    the arguments of a call pass a barrier together with the output of the call before: an edge that orders the calls
    and forbids to merge them, and that costs nothing, for it is removed once the instructions have their order.
    """
    call = jax.jit(run.call)  # traced and lowered once for all calls

    def program(copies: Sequence[Arguments]) -> list[jax.Array]:
        outputs = []
        for arguments in copies:
            if outputs:
                arguments, _ = jax.lax.optimization_barrier((arguments, outputs[-1]))
            outputs.append(call(arguments))
        return outputs

    return program


def time_call(
    program: Callable[[Sequence[Arguments]], list[jax.Array]],
    copies: list[Arguments],
    effort: Effort,
    check: Callable[[jax.Array], None],
) -> Timing:
    """Gives the output on the first copy to `check`, which may raise, and times."""
    turns = math.ceil(len(copies) / CALLS)  # programs until every copy was passed
    windows = [[copies[(n * CALLS + i) % len(copies)] for i in range(CALLS)] for n in range(turns)]

    def sample(programs: int) -> float:
        outputs = None
        start = time.perf_counter()
        for n in range(programs):
            del outputs  # its memory serves the next program, whose addresses then stay the same
            outputs = program(windows[n % turns])
        jax.block_until_ready(outputs)
        return (time.perf_counter() - start) / (programs * CALLS)

    check(program(windows[0])[0])
    first = sample(1)
    programs = max(turns, math.ceil(effort.seconds / (first * CALLS)))
    programs = math.ceil(programs / turns) * turns
    seconds = [first] if programs == 1 else []
    in_time = int(effort.most_seconds / (programs * CALLS * first))
    samples = max(min(effort.samples, in_time), FEWEST_SAMPLES)
    seconds += [sample(programs) for _ in range(samples - len(seconds))]
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

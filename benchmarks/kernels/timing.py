"""Seconds of one call: a jitted program of 20 calls on rotated arguments, divided by 20, launch gaps included.

The arguments of consecutive calls are different copies, enough of them that twice the L2 cache passes between two
calls on the same one: K and V, or a weight, come from memory, as in a model whose layers each have their own.
A sample is as many programs as fill a few milliseconds, dispatched back to back, with one wait at the end. Nothing is
subtracted. A program that the device runs faster than the host dispatches it would show the host's time. Where calls
are so long that ten such samples would take more than a few seconds, a sample is some programs of one call: beside a
call of 10 ms the gap after it is nothing.

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


@dataclass(frozen=True)
class Effort:
    """Samples of a timing, the least seconds that one of them takes, and about the most that they take together.

    The last makes samples shorter, down to a single call, but not fewer: XLA's attention to 32,768 keys takes seconds
    for a program of 20 calls.
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


Program = Callable[[Sequence[Arguments]], list[jax.Array]]


class Started(NamedTuple):
    """A run that is being compiled, by other threads: timing waits until they are done."""

    prepare: Future[Callable[[Arguments], Arguments]] | None
    program: Future[Program]
    compile_single: Callable[[], Program]  # the same of one call, which few runs need


def start(run: Run, shapes: Arguments, pool: Executor) -> Started:
    """Traces a run here, which Python does no faster in many threads, and compiles it in the pool."""
    prepare = None
    if run.prepare is not None:
        prepare = compiled(run.prepare, shapes, pool)
        shapes = jax.eval_shape(run.prepare, shapes)
    program = make_program(run)
    compile_single = lambda: jax.jit(program).lower([shapes]).compile()  # noqa: E731
    return Started(prepare, compiled(program, [shapes] * CALLS, pool), compile_single)


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


def make_program(run: Run) -> Program:
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
    program: Program,
    compile_single: Callable[[], Program],
    copies: list[Arguments],
    effort: Effort,
    check: Callable[[jax.Array], None],
) -> Timing:
    """Gives the output on the first copy to `check`, which may raise, and times."""
    turns = math.ceil(len(copies) / CALLS)  # programs until every copy was passed

    def sample(run: Program, calls: int, programs: int, first: int = 0) -> float:
        """Of programs of so many calls, from a copy on."""
        windows = [[copies[(first + n * calls + i) % len(copies)] for i in range(calls)] for n in range(programs)]
        outputs = None
        start = time.perf_counter()
        for window in windows:
            del outputs  # its memory serves the next program, whose addresses then stay the same
            outputs = run(window)
        jax.block_until_ready(outputs)
        return (time.perf_counter() - start) / (programs * calls)

    check(program([copies[i % len(copies)] for i in range(CALLS)])[0])
    call = sample(program, CALLS, 1)
    programs = max(turns, math.ceil(effort.seconds / (call * CALLS)))
    programs = math.ceil(programs / turns) * turns
    if effort.samples * programs * CALLS * call <= effort.most_seconds:
        seconds = [sample(program, CALLS, programs) for _ in range(effort.samples)]
    else:
        single = compile_single()
        jax.block_until_ready(single(copies[:1]))
        calls = max(1, int(effort.most_seconds / (effort.samples * call)))
        seconds = [sample(single, 1, calls, n * calls) for n in range(effort.samples)]
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

"""One case: every implementation is run, compared with the others, and timed; what fails is kept with its reason.

Compiling takes longer than timing. So some cases are traced first, while threads compile what was traced; nothing is
timed before they are done.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import batched

import jax
import jax.numpy as jnp

from benchmarks.kernels.op import OURS, SPECIFICATION, Arguments, Op, Problem, Run, Unsupported
from benchmarks.kernels.timing import Effort, Started, Timing, compiled, make_copies, start, time_call
from benchmarks.record import Failure, Record
from jaxinfer.roofline import Hardware
from jaxinfer.roofline.cost import Work

AHEAD = 8  # cases that are compiled at the same time
PATIENCE = 120  # seconds; what takes longer hangs
PLAIN = "xla"  # what outputs are compared with where the specification is not asked for
DEFAULT_L2 = 2**27  # no smaller than that of any known device
# The root-mean-square difference of two outputs over the size of one. Rounding operands, weights and output to bf16
# (2 ** -9 each) makes at most 0.5 % of it; a page of 64 missing among the keys of 64x4096 makes 12 %.
TOLERANCE = 0.02


class WrongResult(Exception):
    """An implementation's output is not that of the others."""


@dataclass(frozen=True)
class Bench:
    """What a case is measured with: the device's ceilings, the size of its L2 cache, the effort, and the compilers."""

    ceilings: Hardware
    l2: float
    effort: Effort
    pool: Executor = field(default_factory=lambda: ThreadPoolExecutor(os.cpu_count()))


class Agreement:
    """Compares the outputs of one case, all with the first that comes."""

    def __init__(self):
        self.first: tuple[str, jax.Array] | None = None

    def check(self, implementation: str, output: jax.Array) -> None:
        """Raises WrongResult where an output differs from the first, which is never ours, by more than TOLERANCE."""
        if self.first is None:
            if implementation == OURS:
                raise WrongResult("there is no other output to compare with")
            self.first = implementation, output
            return
        name, expected = self.first
        if output.size != expected.size:
            raise WrongResult(f"shape {output.shape} where that of {name} is {expected.shape}")
        difference = float(_difference(output, expected))
        if not difference <= TOLERANCE:  # also where it is NaN
            raise WrongResult(f"differs from {name} by {difference:.2g} of its size")


@dataclass(frozen=True)
class Case[P: Problem]:
    """A problem and the implementations to time on it, which are being compiled.

    Attributes:
        generate: makes the op's arguments of a random key.
        expected: what makes the output that the others are compared with; None where the first to be timed does.
    """

    op: Op[P]
    name: str
    generate: Future[Callable[[jax.Array], Arguments]]
    runs: dict[str, Started | str]
    expected: Future[Callable[[Arguments], jax.Array]] | None

    @property
    def compiling(self) -> Iterator[Future]:
        yield self.generate
        for started in self.runs.values():
            if not isinstance(started, str):
                yield from (future for future in (started.prepare, started.program) if future is not None)
        if self.expected is not None:
            yield self.expected


def measure_cases(
    selected: Sequence[tuple[Op, str, Sequence[str]]], bench: Bench, deadline: float
) -> Iterator[tuple[Op, str, Iterator[list[Record] | Failure]]]:
    """The outcomes of each case, in turn, of which some are compiled at the same time.

    None is begun after the deadline, a `time.monotonic()`.
    """
    for group in batched(selected, AHEAD):
        if time.monotonic() > deadline:
            return
        cases = [start_case(*selection, bench) for selection in group]
        for case in cases:
            for future in case.compiling:
                future.exception()  # waits
        for case in cases:
            if time.monotonic() > deadline:
                return
            yield case.op, case.name, measure_case(case, bench)


def start_case[P: Problem](op: Op[P], name: str, implementations: Sequence[str], bench: Bench) -> Case[P]:
    """The specification comes first, and ours last."""
    problem = op.problems[name]
    generate, key = partial(op.arguments, problem), jax.random.key(0)
    shapes = jax.eval_shape(generate, key)
    runs = {
        implementation: start_run(partial(op.implementations[implementation], problem), shapes, bench.pool)
        for implementation in sorted(implementations, key=_order)
    }
    expected = None
    if not {SPECIFICATION, PLAIN} & set(runs):
        expected = compiled(op.implementations[PLAIN](problem).call, shapes, bench.pool)
    return Case(op, name, compiled(generate, key, bench.pool), runs, expected)


def measure_case(case: Case, bench: Bench) -> Iterator[list[Record] | Failure]:
    """The records of each implementation on one problem, or its failure, as they come."""
    title, agreement, expected = case.op.case(case.name), Agreement(), case.expected
    if expected is not None:
        compare = lambda: agreement.check(PLAIN, expected.result()(case.generate.result()(jax.random.key(0))))  # noqa: E731
        if (reason := attempt(compare)) is not None:
            yield Failure(title, PLAIN, f"nothing to compare with: {reason}")
    for implementation in [*case.runs]:
        started = case.runs.pop(implementation)  # its programs go when they are timed
        with watched(f"{title} {implementation}"):
            outcome = time_started(started, case.generate, bench, partial(agreement.check, implementation))
        if isinstance(outcome, str):
            yield Failure(title, implementation, outcome)
        else:
            yield to_records(title, implementation, case.op.problems[case.name], outcome, bench.ceilings)


def start_run(make_run: Callable[[], Run], shapes: Arguments, pool: Executor) -> Started | str:
    """A run that is being compiled, or why it cannot be."""
    return attempt(lambda: start(make_run(), shapes, pool))


def time_started(
    started: Started | str,
    generate: Future[Callable[[jax.Array], Arguments]],
    bench: Bench,
    check: Callable[[jax.Array], None],
) -> Timing | str:
    """Times a run, or says why there is no time."""
    if isinstance(started, str):
        return started

    def timed() -> Timing:
        copies = make_copies(started, generate.result(), bench.l2)
        return time_call(started.program.result(), started.compile_single, copies, bench.effort, check)

    return attempt(timed)


def attempt[Result](function: Callable[[], Result]) -> Result | str:
    """The result, or why there is none: one implementation that cannot run must not end the others."""
    try:
        return function()
    except Unsupported as error:
        return str(error)
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {first_line}"[:300]


@contextmanager
def watched(what: str) -> Iterator[None]:
    """Ends the process when the device hangs: nothing else can, and what was measured before is written."""

    def give_up() -> None:
        print(f"{what} did not end within {PATIENCE} s", flush=True)
        os._exit(1)

    timer = threading.Timer(PATIENCE, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def to_records(case: str, implementation: str, problem: Problem, timing: Timing, ceilings: Hardware) -> list[Record]:
    """The time of a call, and the rates that the problem's FLOPs and bytes make of it."""
    limit = Work(flops=problem.flops, cache=problem.bytes, dtype="bf16").limit(ceilings)
    fraction, median, low, high = limit / timing.median, *(1e6 * x for x in (timing.median, timing.low, timing.high))
    return [
        Record(case, implementation, "time", median, "us", fraction, low, high, timing.samples),
        Record(case, implementation, "arithmetic", problem.flops / timing.median / 1e12, "TFLOP/s", fraction),
        Record(case, implementation, "traffic", problem.bytes / timing.median / 1e12, "TB/s", fraction),
    ]


def _order(implementation: str) -> int:
    """What ours is compared with comes before it, the specification first of all."""
    return {SPECIFICATION: 0, PLAIN: 1, OURS: 3}.get(implementation, 2)


@jax.jit
def _difference(output: jax.Array, expected: jax.Array) -> jax.Array:
    x, y = (array.astype(jnp.float32).reshape(-1) for array in (output, expected))
    return jnp.linalg.norm(x - y) / jnp.linalg.norm(y)

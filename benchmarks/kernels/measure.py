"""One case: every implementation is run, compared with the others, and timed; what fails is kept with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.kernels.op import OURS, SPECIFICATION, Arguments, Op, Problem, Run, Unsupported
from benchmarks.kernels.timing import Effort, Timing, make_copies, time_call
from benchmarks.record import Failure, Record
from jaxinfer.roofline import Hardware
from jaxinfer.roofline.cost import Work

DEFAULT_L2 = 2**27  # no smaller than that of any known device
# The root-mean-square difference of two outputs over the size of one. Rounding operands, weights and output to bf16
# (2 ** -9 each) makes at most 0.5 % of it; a page of 64 missing among the keys of 64x4096 makes 12 %.
TOLERANCE = 0.02


class WrongResult(Exception):
    """An implementation's output is not that of the others."""


@dataclass(frozen=True)
class Bench:
    """What a case is measured with: the device's ceilings, the size of its L2 cache, and the effort."""

    ceilings: Hardware
    l2: float
    effort: Effort


class Agreement:
    """Compares the outputs of one case, all with the first that comes."""

    def __init__(self):
        self.first: tuple[str, jax.Array] | None = None

    def check(self, implementation: str, output: jax.Array) -> None:
        """Raises WrongResult where an output differs from the first by more than TOLERANCE."""
        if self.first is None:
            self.first = implementation, output
            return
        name, expected = self.first
        if output.size != expected.size:
            raise WrongResult(f"shape {output.shape} where that of {name} is {expected.shape}")
        difference = float(_difference(output, expected))
        if not difference <= TOLERANCE:  # also where it is NaN
            raise WrongResult(f"differs from {name} by {difference:.2g} of its size")


def measure_case[P: Problem](
    op: Op[P], name: str, implementations: Sequence[str], bench: Bench
) -> Iterator[list[Record] | Failure]:
    """The records of each implementation on one problem, or its failure, as they come; the specification first."""
    problem, agreement = op.problems[name], Agreement()
    generate = jax.jit(partial(op.arguments, problem))
    for implementation in sorted(implementations, key=_order):
        make_run = partial(op.implementations[implementation], problem)
        outcome = attempt(make_run, generate, bench, partial(agreement.check, implementation))
        if isinstance(outcome, str):
            yield Failure(op.case(name), implementation, outcome)
        else:
            yield to_records(op.case(name), implementation, problem, outcome, bench.ceilings)


def attempt(
    make_run: Callable[[], Run],
    generate: Callable[[jax.Array], Arguments],
    bench: Bench,
    check: Callable[[jax.Array], None],
) -> Timing | str:
    """Times a run, or says why there is no time: one that cannot run must not end the others."""
    try:
        run = make_run()
        return time_call(run, make_copies(run, generate, bench.l2), bench.effort, check)
    except Unsupported as error:
        return str(error)
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {first_line}"[:300]


def to_records(case: str, implementation: str, problem: Problem, timing: Timing, ceilings: Hardware) -> list[Record]:
    """The time of a call, and the rates that the problem's FLOPs and bytes make of it."""
    limit = Work(flops=problem.flops, cache=problem.bytes, dtype="bf16").limit(ceilings)
    fraction, median, low, high = limit / timing.median, *(1e6 * x for x in (timing.median, timing.low, timing.high))
    return [
        Record(case, implementation, "time", median, "us", fraction, low, high),
        Record(case, implementation, "arithmetic", problem.flops / timing.median / 1e12, "TFLOP/s", fraction),
        Record(case, implementation, "traffic", problem.bytes / timing.median / 1e12, "TB/s", fraction),
    ]


def _order(implementation: str) -> int:
    """What ours is compared with comes before it, the specification first of all."""
    return {SPECIFICATION: 0, "xla": 1, OURS: 3}.get(implementation, 2)


@jax.jit
def _difference(output: jax.Array, expected: jax.Array) -> jax.Array:
    x, y = (array.astype(jnp.float32).reshape(-1) for array in (output, expected))
    return jnp.linalg.norm(x - y) / jnp.linalg.norm(y)

"""The search for configs: every candidate of our kernel is timed, and the best one of each key is kept as data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax

from benchmarks.kernels.measure import Agreement, Bench, attempt
from benchmarks.kernels.op import Op, Problem, Unsupported

Times = dict[Any, float]  # seconds by config


def tune[P: Problem](op: Op[P], names: Sequence[str], bench: Bench, device: str) -> Iterator[str]:
    """Times the candidates of the named problems and saves the best of each key for `device`; a line for each step.

    Raises:
        Unsupported: the op has nothing to tune.
    """
    if op.tuning is None:
        raise Unsupported(f"{op.name} has no configs to choose from")
    keys = defaultdict(list)
    for name in names:
        keys[op.tuning.tuning_key(op.problems[name])].append(name)
    for key, sharing in keys.items():
        times: list[Times] = []
        for name in sharing:
            times.append({})
            yield from time_candidates(op, name, bench, times[-1])
        if (best := choose(times)) is None:
            yield f"{op.name} {key}: no candidate runs on all of its problems"
        else:
            op.tuning.save_tuned(device, key, best)
            yield f"{op.name} {key}: {best}"


def time_candidates[P: Problem](op: Op[P], name: str, bench: Bench, times: Times) -> Iterator[str]:
    """Fills `times` with those of the candidates that run and agree with the XLA implementation."""
    assert op.tuning is not None
    assert op.configured is not None
    problem, agreement = op.problems[name], Agreement()
    generate = jax.jit(partial(op.arguments, problem))
    agreement.check("xla", jax.jit(op.implementations["xla"](problem).call)(generate(jax.random.key(0))))
    for config in op.tuning.candidates(problem):
        make_run = partial(op.configured, problem, config)
        outcome = attempt(make_run, generate, bench, partial(agreement.check, "the candidate"))
        if isinstance(outcome, str):
            yield f"{op.case(name)}  {config}  failed: {outcome}"
        else:
            times[config] = outcome.median
            yield f"{op.case(name)}  {config}  {outcome.median * 1e6:,.4g} us"


def choose(times: Sequence[Times]) -> Any | None:
    """The config with the least sum of times, each over the best of its problem; None if none ran on every one."""
    complete = set(times[0]).intersection(*times[1:])
    best = [min(of_problem.values(), default=0.0) for of_problem in times]

    def loss(config: Any) -> float:
        return sum(of_problem[config] / least for of_problem, least in zip(times, best, strict=True))

    return min(complete, key=loss, default=None)

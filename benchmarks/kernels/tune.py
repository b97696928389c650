"""The search for configs: every candidate of our kernel is timed, and the best one of each key is kept as data."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from benchmarks.kernels.measure import PLAIN, Agreement, Bench, start_run, time_started, watched
from benchmarks.kernels.op import Op, Problem, Unsupported
from benchmarks.kernels.timing import compiled
from pallas_kernels import tuned

HOPELESS = 1.25  # a candidate so many times slower than the best on one problem is not tried on the others of its key

Times = dict[Any, float]  # seconds by config


def tune[P: Problem](
    op: Op[P], names: Sequence[str], bench: Bench, device: str, path: Path, deadline: float
) -> Iterator[str]:
    """Times the candidates of the named problems and saves the best of each key in `path`; a line for each step.

    A key is saved as soon as its problems are done, and none is begun after the deadline, a `time.monotonic()`.

    Raises:
        Unsupported: the op has nothing to tune.
    """
    if op.tuning is None:
        raise Unsupported(f"{op.name} has no configs to choose from")
    if not path.exists() and op.tuning.path.exists():  # a copy elsewhere has the other entries too
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(op.tuning.path.read_text())
    keys = defaultdict(list)
    for name in names:
        keys[op.tuning.key(op.problems[name])].append(name)
    for key, sharing in keys.items():
        if time.monotonic() > deadline:
            yield f"{op.name} {key}: not begun, the time is up"
            continue
        times: list[Times] = []
        for name in sharing:
            candidates = op.tuning.candidates(op.problems[name])
            if times:
                candidates = [config for config in candidates if config in hopeful(times[-1])]
            times.append({})
            yield from time_candidates(op, name, candidates, bench, times[-1])
        if (best := choose(times)) is None:
            yield f"{op.name} {key}: no candidate runs on all of its problems"
        else:
            seconds = times[0][best]
            tuned.save(path, device, key, best, seconds)
            yield f"{op.name} {key}: {best}, {seconds * 1e6:,.4g} us"


def time_candidates[P: Problem](
    op: Op[P], name: str, candidates: Sequence[Any], bench: Bench, times: Times
) -> Iterator[str]:
    """Fills `times` with those of the candidates that run and agree with the XLA implementation."""
    assert op.tuning is not None
    problem, agreement = op.problems[name], Agreement()
    generate, key = partial(op.arguments, problem), jax.random.key(0)
    shapes = jax.eval_shape(generate, key)
    plain = compiled(op.implementations[PLAIN](problem).call, shapes, bench.pool)
    make = compiled(generate, key, bench.pool)
    started = {
        config: start_run(partial(op.tuning.configured, problem, config), shapes, bench.pool) for config in candidates
    }
    agreement.check(PLAIN, plain.result()(make.result()(key)))
    for run in started.values():
        if not isinstance(run, str):
            run.program.exception()  # waits
    while started:
        config = next(iter(started))
        title = f"{op.case(name)}  {config}"
        with watched(title):
            outcome = time_started(started.pop(config), make, bench, partial(agreement.check, "the candidate"))
        if isinstance(outcome, str):
            yield f"{title}  failed: {outcome}"
        else:
            times[config] = outcome.median
            yield f"{title}  {outcome.median * 1e6:,.4g} us"


def hopeful(times: Times) -> set[Any]:
    """The candidates that may still be the best of their key."""
    best = min(times.values(), default=0.0)
    return {config for config, seconds in times.items() if seconds <= HOPELESS * best}


def choose(times: Sequence[Times]) -> Any | None:
    """The config with the least sum of times, each over the best of its problem; None if none ran on every one."""
    complete = set(times[0]).intersection(*times[1:])
    best = [min(of_problem.values(), default=0.0) for of_problem in times]

    def loss(config: Any) -> float:
        return sum(of_problem[config] / least for of_problem, least in zip(times, best, strict=True))

    return min(complete, key=loss, default=None)

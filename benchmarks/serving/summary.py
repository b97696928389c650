"""What many timelines say together: percentiles, throughput, and how many requests got what was promised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.record import Record
from benchmarks.serving.online import Timeline

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Objective:
    """What a request must not exceed to count as served well, in seconds."""

    first_token: float = 1.0
    per_token: float = 0.05

    def met(self, timeline: Timeline) -> bool:
        if timeline.error is not None:
            return False
        return timeline.first_token <= self.first_token and timeline.per_token <= self.per_token


def summarize(case: str, implementation: str, timelines: Sequence[Timeline], objective: Objective) -> list[Record]:
    """The records of one rate of arrival; goodput counts the requests that met the objective.

    Raises:
        RuntimeError: no request was answered; with the first reason.
    """
    answered = [timeline for timeline in timelines if timeline.error is None]
    if not answered:
        raise RuntimeError(f"no request of {case!r} was answered: {timelines[0].error}")
    seconds = max(timeline.pieces[-1] for timeline in answered) - min(timeline.sent for timeline in timelines)
    tokens = sum(timeline.tokens for timeline in answered)
    well = sum(map(objective.met, timelines))
    times = {
        "first token": [timeline.first_token for timeline in answered],
        "time per token": [timeline.per_token for timeline in answered],
        "gap": [gap for timeline in answered for gap in timeline.gaps] or [0.0],
        "end to end": [timeline.whole for timeline in answered],
    }
    return [
        Record(case, implementation, "output throughput", tokens / seconds, "tok/s"),
        Record(case, implementation, "goodput", well / seconds, "requests/s"),
        Record(case, implementation, "objective, first token", objective.first_token * 1e3, "ms"),
        Record(case, implementation, "objective, time per token", objective.per_token * 1e3, "ms"),
        Record(case, implementation, "requests", len(timelines), "requests"),
        Record(case, implementation, "failed", len(timelines) - len(answered), "requests"),
        *(
            Record(case, implementation, f"{name} p{percent}", float(np.percentile(values, percent)) * 1e3, "ms")
            for name, values in times.items()
            for percent in PERCENTILES
        ),
    ]

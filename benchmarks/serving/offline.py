"""Requests that are all there at once, through the engine, with its continuous batching and without."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.serving.workload import Job
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Engine, Request


@dataclass(frozen=True)
class Throughput:
    """What a run took. Tokens in are those of the prompts."""

    seconds: float
    tokens_in: int
    tokens_out: int

    @property
    def output_rate(self) -> float:
        return self.tokens_out / self.seconds

    @property
    def total_rate(self) -> float:
        return (self.tokens_in + self.tokens_out) / self.seconds


def run(engine: Engine, jobs: Sequence[Job], batch: int | None = None) -> Throughput:
    """Serves all jobs, greedy.

    Args:
        engine: idle, and warm if compiling is not to count.
        batch: jobs that are given to it at a time, the next ones when all of these have ended: static batching. By
            default it gets all of them at once.
    """
    requests = [_request(number, job) for number, job in enumerate(jobs)]
    size, generated = batch or len(requests), 0
    start = time.perf_counter()
    for first in range(0, len(requests), size):
        generated += _drain(engine, requests[first : first + size])
    seconds = time.perf_counter() - start
    assert generated == sum(job.output for job in jobs)
    return Throughput(seconds, sum(len(job.prompt) for job in jobs), generated)


def _drain(engine: Engine, requests: Sequence[Request]) -> int:
    """Adds the requests and steps until each has ended; the number of their tokens."""
    for request in requests:
        engine.add(request)
    left, tokens = len(requests), 0
    while left:
        for update in engine.step():
            tokens += len(update.tokens)
            left -= update.finish_reason is not None
    return tokens


def _request(number: int, job: Job) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=job.output, ignore_eos=True)
    return Request(number, job.prompt, params, (), 0)

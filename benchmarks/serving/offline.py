"""Requests that are all there at once, through the engine, with its continuous batching and without."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import batched

from benchmarks.bench import mesh_of, on
from benchmarks.record import OURS, Record
from benchmarks.serving.workload import Job, Workload
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Engine, Request
from jaxinfer.roofline import Hardware, Precision, workload_limit

STATIC = f"{OURS}, static batching"


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


def measure(engine: Engine, case: str, workload: Workload, ceilings: Hardware, static: bool = False) -> list[Record]:
    """The records of one workload.

    Args:
        ceilings: fractions are of the limit that they set, for as many slots as there are requests.
        static: also by static batching, of as many requests as there are slots.
    """
    config, layout = engine.model.config, engine.layout
    precision = Precision.all_in(config.dtype, layout.cache_dtype)
    mesh, sizes = mesh_of(engine.model), workload.sizes
    shares = mesh.pipe * mesh.context  # that the limit knows nothing of
    limit = workload_limit(config, ceilings, sizes, workload.shared, precision, mesh.tensor) if shares == 1 else None
    case += on(mesh)
    runs = {OURS: run(engine, workload.jobs(config.vocab_size, seed=0))}
    if static:  # with other prompts: those of the first run can be found in the cache
        runs[STATIC] = run(engine, workload.jobs(config.vocab_size, seed=1), layout.slots)
    records = []
    for name, took in runs.items():
        fraction = limit and limit / took.seconds
        records += [
            Record(case, name, "output throughput", took.output_rate, "tok/s", fraction),
            Record(case, name, "throughput in and out", took.total_rate, "tok/s", fraction),
        ]
    if static:
        ratio = runs[STATIC].seconds / runs[OURS].seconds
        records.append(Record(case, OURS, "continuous over static batching", ratio, "x"))
    return records


def run(engine: Engine, jobs: Sequence[Job], batch: int | None = None) -> Throughput:
    """Serves all jobs, greedy.

    Args:
        engine: idle, and warm if compiling is not to count.
        batch: jobs that are given to it at a time, the next ones when all of these have ended: static batching, in
            which every sequence keeps its place, and is computed, until the longest has ended. What comes past the end
            of a job does not count. By default the engine gets all jobs at once.
    """
    batches = [list(jobs)] if batch is None else [as_long(jobs) for jobs in batched(jobs, batch)]
    numbers = itertools.count()
    requests = [[request(next(numbers), job) for job in batch] for batch in batches]
    start = time.perf_counter()
    generated = sum(_drain(engine, batch) for batch in requests)
    seconds = time.perf_counter() - start
    assert generated == sum(job.output for batch in batches for job in batch)
    return Throughput(seconds, sum(len(job.prompt) for job in jobs), sum(job.output for job in jobs))


def as_long(jobs: Sequence[Job]) -> list[Job]:
    """The jobs of a static batch, each of which goes on until the longest has ended."""
    longest = max(job.output for job in jobs)
    return [replace(job, output=longest) for job in jobs]


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


def request(number: int, job: Job) -> Request:
    """A job that the engine knows by that number."""
    params = SamplingParams(temperature=0.0, max_tokens=job.output, ignore_eos=True)
    return Request(number, job.prompt, params, (), 0)

"""Decoding through the engine: plainly, with proposals where the engine's gate lets them, and always."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.record import OURS, Record
from benchmarks.serving.offline import request
from benchmarks.serving.workload import Job
from benchmarks.speculative.methods import name_of
from jaxinfer.decode.sampling import GREEDY, needs
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Engine, Request
from jaxinfer.engine.buckets import rectangle, rectangles, step_size
from jaxinfer.engine.costs import predicted_costs
from jaxinfer.engine.gate import Gate, predicted_gate
from jaxinfer.engine.metrics import Counters
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sequence import Sequence as Sequenced
from jaxinfer.engine.warm_up import Program, loop_program, make_ready, prompt_program, time_loops
from jaxinfer.roofline import Verification, tokens_per_step

ALONE = 4  # texts at the least: of a smaller batch come as many after one another
PLAIN = OURS
FASTER = "over plain decoding"


class Shut(Gate):
    """Proposes nothing."""

    def drafts(self, decoding: list[Sequenced]) -> int:
        return 0


@dataclass(frozen=True)
class Run:
    """What decoding took, from when every sequence has its first token until all have their last; and of the steps
    with proposals how often the first proposed token was right, the first two, and so on."""

    seconds: float
    tokens: int
    drafts: int
    accepted: tuple[float, ...]
    texts: list[list[int]]


def warm(engine: Engine, groups: Sequence[Sequence[Job]]) -> None:
    """Compiles what these meet, each group served greedily, plainly or with proposals of all sizes: a small part of
    what the engine's own warm-up does."""
    runner, slots = engine.runner, engine.layout.slots
    decoding = [size for size in rectangles(slots) if size <= rectangle(min(max(map(len, groups)), slots), slots)]
    prompts = {step for group in groups for step in prompt_steps(engine, group)}
    programs = [
        Program("slots and page tables", runner.update_all),
        *(prompt_program(runner, *step) for step in sorted(prompts)),
        *(
            loop_program(runner, size, GREEDY, drafts)
            for size, drafts in itertools.product(decoding, (0, *engine.layout.choices))
        ),
    ]
    print(make_ready(programs, None, runner.wait), flush=True)


def warm_loops(engine: Engine, every: Iterable[SamplingParams]) -> None:
    """Compiles the decode steps of an engine that always proposes, for requests of each of these kinds; steps with
    prompts are compiled as they come."""
    runner, kinds = engine.runner, dict.fromkeys(needs([params]) for params in every)
    sizes = itertools.product(rectangles(engine.layout.slots), kinds)
    programs = [loop_program(runner, size, kind, engine.layout.depth) for size, kind in sizes]
    print(make_ready(programs, None, runner.wait), flush=True)


def prompt_steps(engine: Engine, jobs: Sequence[Job]) -> Iterator[tuple[int, bool]]:
    """The rows of each step with prompts in it that an idle engine makes of these, and whether some decode there."""
    counters, gate = Counters(), Shut(engine.layout)
    windows = engine.model.config.windows
    scheduler = Scheduler(engine.layout, windows, engine.options, counters, engine.budget, gate)
    for number, job in enumerate(jobs):
        scheduler.add(request(number, job))
    while (plan := scheduler.schedule()).chunks:
        rows = len(plan.decoding) + sum(chunk.tokens for chunk in plan.chunks)
        yield step_size(rows, prompts=True), bool(plan.decoding)


def groups_of(jobs: Sequence[Job], batches: Sequence[int]) -> list[list[Job]]:
    """Those that are served together, for all batches."""
    return [list(group) for batch in batches for group in itertools.batched(served(jobs, batch), batch)]


def served(jobs: Sequence[Job], batch: int) -> list[Job]:
    """The jobs for a batch; of a smaller one than ALONE so many after one another."""
    return list(itertools.islice(itertools.cycle(jobs), max(batch, ALONE)))


def run(engine: Engine, gate: Gate, jobs: Sequence[Job], batch: int) -> Run:
    """Serves the jobs, `batch` of them at a time."""
    engine.gate = engine.scheduler.gate = gate
    counters = engine.counters
    drafts, accepted = counters.drafts, counters.accepted
    seconds, tokens, texts = 0.0, 0, []
    for group in itertools.batched(jobs, batch):
        written = _decode(engine, [request(number, job) for number, job in enumerate(group)])
        seconds, tokens = seconds + written[0], tokens + written[1]
        texts += written[2]
    drafts = counters.drafts - drafts
    right = [new - old for new, old in itertools.zip_longest(counters.accepted, accepted, fillvalue=0)]
    return Run(seconds, tokens, drafts, tuple(count / drafts for count in right) if drafts else (), texts)


def _decode(engine: Engine, requests: Sequence[Request]) -> tuple[float, int, list[list[int]]]:
    texts, start, before = {one.id: list[int]() for one in requests}, 0.0, 0
    for one in requests:
        engine.add(one)
    while engine.busy:
        for update in engine.step():
            texts[update.request.id] += update.tokens
        if not start and all(texts.values()):
            start, before = time.perf_counter(), sum(map(len, texts.values()))
    tokens = sum(map(len, texts.values()))
    assert tokens == sum(one.params.max_tokens for one in requests)
    return time.perf_counter() - start, tokens - before, list(texts.values())


def compare(engine: Engine, case: str, jobs: Sequence[Job], batch: int, rounds: int) -> list[Record]:
    """The records of one batch: plain decoding, speculation as the gate has it, and always. Each is the fastest of
    some rounds.

    Args:
        jobs: of which those are `served` that a batch takes.
    """
    jobs = served(jobs, batch)
    gated, always = ways(engine)
    gate = predicted_gate(engine.model, engine.layout, engine.options)
    time_loops(engine.runner, GREEDY, gate, rectangle(batch, engine.layout.slots))  # as an engine's warm-up does
    gates = {PLAIN: Shut(engine.layout), gated: gate, always: Gate(engine.layout)}
    took = {
        way: min((run(engine, gate, jobs, batch) for _ in range(rounds)), key=lambda one: one.seconds)
        for way, gate in gates.items()
    }
    records = [Record(case, way, "decode", one.tokens / one.seconds, "tok/s") for way, one in took.items()]
    for way in (gated, always):
        records.append(Record(case, way, FASTER, took[PLAIN].seconds / took[way].seconds, "x"))
        records += _acceptance(case, way, took[way])
    speedup = predicted(engine, jobs, batch).speedup(tokens_per_step(took[always].accepted))
    records.append(Record(case, "plan", FASTER, max(speedup, 1.0), "x"))
    records.append(Record(case, f"plan, {always}", FASTER, speedup, "x"))
    return records


def ways(engine: Engine) -> tuple[str, str]:
    """What an engine with speculation is called in records: with its gate, and without."""
    assert engine.layout.speculation is not None
    by = name_of(engine.layout.speculation)
    return f"{OURS}, {by}", f"{OURS}, {by} always"


def _acceptance(case: str, way: str, took: Run) -> list[Record]:
    if not took.accepted:
        return []
    return [
        Record(case, way, "tokens of a step with proposals", tokens_per_step(took.accepted), "tokens"),
        *(
            Record(case, way, f"first {count} right", 100 * fraction, "%")
            for count, fraction in enumerate(took.accepted, 1)
        ),
    ]


def predicted(engine: Engine, jobs: Sequence[Job], batch: int) -> Verification:
    """What the engine's gate goes by at first, halfway through the outputs."""
    halfway = int(np.mean([len(job.prompt) + job.output / 2 for job in jobs]))
    costs = predicted_costs(engine.model, engine.layout)
    return Verification(*(costs.predicted([halfway] * batch, drafts) for drafts in (0, engine.layout.depth)))

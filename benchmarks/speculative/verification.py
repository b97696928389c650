"""What a step costs that proposes tokens and verifies them, none of which is right."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks.bench import Bench, Subject
from benchmarks.decode import PROMPT
from benchmarks.record import Record
from benchmarks.speculative.methods import changed, name_of
from jaxinfer.decode.sampling import GREEDY
from jaxinfer.decode.speculative import Speculation
from jaxinfer.engine.costs import predicted_costs
from jaxinfer.roofline import decode_step

OVER = "over a plain step"
SLACK = 64  # tokens that a sequence may have beside those of its steps, should a proposal be right after all


def missed(method: Speculation, vocabulary: int) -> Speculation:
    """The method with proposals put off by one token: they cost what they cost, and are never right."""
    return changed(method, lambda proposal, _: proposal._replace(drafts_Bk=(proposal.drafts_Bk + 1) % vocabulary))


def verifying(subject: Subject, batch: int, methods: Sequence[Speculation], new: int, rounds: int) -> list[Record]:
    """A plain step, and for each method one that verifies what it proposes: measured, predicted, and over the plain
    one."""
    vocabulary, length = subject.model.config.vocab_size, PROMPT + new + SLACK
    benches = [Bench(subject, batch, length, one) for one in (None, *(missed(one, vocabulary) for one in methods))]
    compile_all(benches)
    seconds: list[list[float]] = [[] for _ in benches]
    for _ in range(rounds + 1):
        for bench, taken in zip(benches, seconds, strict=True):
            bench.prefill(PROMPT, PROMPT)
            taken.append(bench.decode(new) / new)
            assert int(bench.state.length_B.max()) <= bench.layout.max_tokens
    names = ["plain", *map(_name, methods)]
    plain = statistics.median(seconds[0][1:]), predicted(subject, benches[0], new)
    records = []
    for name, bench, (_, *taken) in zip(names, benches, seconds, strict=True):
        case = subject.case(f"B{batch} {name}")
        step, expected = statistics.median(taken), predicted(subject, bench, new)
        records += [_step(subject, case, bench, new, taken), Record(case, subject.plan, "step", expected * 1e3, "ms")]
        if bench.layout.drafts:
            records += [
                Record(case, subject.attention, OVER, step / plain[0], "x"),
                Record(case, subject.plan, OVER, expected / plain[1], "x"),
            ]
    return records


def _name(method: Speculation) -> str:
    by = "" if (name := name_of(method)) == "lookup" else f" by {name}"
    return f"{method.num_speculative_tokens} drafts{by}"


def _step(subject: Subject, case: str, bench: Bench, new: int, seconds: Sequence[float]) -> Record:
    drafts, batch = bench.layout.drafts, bench.layout.slots
    limit = decode_step(subject.model.config, batch, PROMPT + new // 2 + drafts, subject.precision, queries=1 + drafts)
    step, took = statistics.median(seconds), [1e3 * one for one in seconds]
    fraction = limit.fraction(subject.ceilings, step)
    return Record(case, subject.attention, "step", step * 1e3, "ms", fraction, min(took), max(took), len(took))


def predicted(subject: Subject, bench: Bench, new: int) -> float:
    """Seconds of the step halfway through the new tokens, by what an engine's gate goes by."""
    costs = predicted_costs(subject.model, bench.layout, subject.machine)
    return costs.predicted([PROMPT + new // 2] * bench.layout.slots, bench.layout.depth)


def compile_all(benches: Sequence[Bench]) -> None:
    """The large programs of each, in as many threads as there are processors."""
    lowered = []
    for bench in benches:
        (step,) = bench.admit(PROMPT, PROMPT)
        state = bench.params, bench.state, bench.cache
        slots_B = np.arange(bench.layout.slots, dtype=np.int32)
        lowered.append(bench.programs.lower_step(*state, step))
        loop = {"steps": bench.subject.steps, "needs": GREEDY, "drafts": bench.layout.depth}
        lowered.append(bench.programs.lower_loop(*state, slots_B, **loop))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda one: one.compile(), lowered))

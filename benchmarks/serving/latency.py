"""How long tokens take through an engine: where sequences decode, where a prompt comes alone, and where a long prompt
comes beside sequences that decode."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.bench import mesh_of, on
from benchmarks.decode import NEW, PROMPT, REPEATS
from benchmarks.record import MACHINE, OURS, Record
from benchmarks.serving import replay
from benchmarks.serving.offline import request
from benchmarks.serving.workload import Workload
from jaxinfer.decode.batch import StepInput
from jaxinfer.engine import Engine, Request
from jaxinfer.roofline import Hardware, Mesh, Precision
from jaxinfer.roofline.pipeline import decode_on, prefill_on

FIRST_TOKENS = 5  # prompts of each length, after a warm-up
SPARE = 4  # times the new tokens that are timed, which each sequence may have: none ends meanwhile
ROOM = PROMPT + SPARE * NEW  # tokens that a sequence may have beside the longest prompt
PIECES = 5_000  # of plain Python, a millisecond each, that the host is timed with
SETTLE, STEADY = 6, 20  # programs of decode steps before the long prompt: not timed, and timed


@dataclass(frozen=True)
class Stall:
    """A prompt of `prompt` tokens comes while `decoding` sequences decode after prompts of `context` tokens."""

    decoding: int = 16
    context: int = 1000
    prompt: int = 32768

    @property
    def name(self) -> str:
        return f"prompt {self.prompt} beside {self.decoding}"


@dataclass
class Desk:
    """Asks an engine, never for a prompt twice, and notes when it answers.

    Attributes:
        name: of the model in the records.
        ceilings: fractions are of the limit that they set.
        drawn: requests so far; the next one has this number.
        asked: numbers of those that the engine has.
        told: when it last told something.
        preempted: sequences that the engine had preempted before.
    """

    name: str
    engine: Engine
    ceilings: Hardware
    drawn: int = 0
    asked: set[int] = field(default_factory=set)
    told: float = 0.0
    preempted: int = field(init=False)

    def __post_init__(self) -> None:
        self.preempted = self.engine.counters.preemptions

    @property
    def precision(self) -> Precision:
        return Precision.all_in(self.engine.model.config.dtype, self.engine.layout.cache_dtype)

    @property
    def mesh(self) -> Mesh:
        return mesh_of(self.engine.model)

    def case(self, what: str) -> str:
        """The name of a case in the records."""
        return f"{self.name} {what}{on(self.mesh)}"

    def draw(self, count: int, prompt: int, output: int) -> list[Request]:
        """So many requests, to be asked."""
        vocabulary = self.engine.model.config.vocab_size
        jobs = Workload(((prompt, output),) * count).jobs(vocabulary, seed=self.drawn)
        self.drawn += count
        return [request(number, job) for number, job in enumerate(jobs, self.drawn - count)]

    def ask(self, requests: Sequence[Request]) -> float:
        """Hands them in; when that began."""
        start = time.perf_counter()
        for one in requests:
            self.engine.add(one)
        self.asked |= {one.id for one in requests}
        return start

    def hear(self) -> dict[int, int]:
        """Steps until there is something: how many tokens a program brought, by request."""
        while not (updates := self.engine.step()):
            assert self.engine.busy
        self.told = time.perf_counter()
        assert all(update.finish_reason is None for update in updates)
        return {update.request.id: len(update.tokens) for update in updates}

    def hear_first(self, requests: Sequence[Request]) -> None:
        """Until each of them has a token."""
        left = {one.id for one in requests}
        while left:
            left -= self.hear().keys()

    def clear(self) -> None:
        """Drops all that was asked, and waits until the engine is idle."""
        for number in self.asked:
            self.engine.abort(number)
        self.asked.clear()
        while self.engine.busy:
            self.engine.step()
        assert self.engine.counters.preemptions == self.preempted


def measure(desk: Desk, prompts: Sequence[int], stalls: Sequence[Stall]) -> Iterator[list[Record]]:
    """The records of the host, then of what prompts take alone and beside others, one case after the other."""
    yield host()
    for tokens in prompts:
        yield first_token(desk, tokens)
    for stall in stalls:
        yield beside(desk, stall)


def host() -> list[Record]:
    """How evenly this machine runs plain Python, equal pieces of it one after the other. What they take beyond their
    median, the machine has given to others; in that time no token reaches anyone."""
    seconds = np.array([_piece() for _ in range(PIECES)])
    middle = float(np.median(seconds))
    return [
        Record(MACHINE, "measured", "piece of Python", middle * 1e3, "ms", samples=PIECES),
        Record(MACHINE, "measured", "p99 over a piece of Python", float(np.percentile(seconds, 99)) / middle, "x"),
        Record(MACHINE, "measured", "worst over a piece of Python", float(seconds.max()) / middle, "x"),
    ]


def _piece() -> float:
    start, total = time.perf_counter(), 0
    for number in range(20_000):
        total += number
    return time.perf_counter() - start


def decoding(desk: Desk, batch: int, how: str = "") -> list[Record]:
    """NEW tokens of each of so many sequences, from when all have their first one: every step has all of them.

    Prompts come with no budget, or else the first sequences are far on when the last has its first token, and their
    contexts longer than is said.

    Args:
        how: the end of the case's name.
    """
    steps = sorted([_decode_step(desk, batch) for _ in range(REPEATS + 1)][1:])  # in the order of time, but the first
    step, context = statistics.median(steps), PROMPT + NEW // 2
    cost = decode_on(desk.engine.model.config, desk.mesh, batch, context, desk.precision)
    fraction = cost.limit(desk.ceilings) / step
    rates = [batch / seconds for seconds in steps]
    case, spread = desk.case(f"B{batch}{how}"), (steps[0] * 1e3, steps[-1] * 1e3, len(steps))
    return [
        Record(case, OURS, "decode", batch / step, "tok/s", fraction, rates[-1], rates[0], len(rates)),
        Record(case, OURS, "decode step", step * 1e3, "ms", fraction, *spread),
    ]


def _decode_step(desk: Desk, batch: int) -> float:
    """Seconds of a step."""
    requests = desk.draw(batch, PROMPT, SPARE * NEW)
    desk.ask(requests)
    desk.hear_first(requests)
    start, tokens = desk.told, 0
    while tokens < batch * NEW:
        tokens += sum(desk.hear().values())
    seconds = desk.told - start
    desk.clear()
    return seconds * batch / tokens


def first_token(desk: Desk, tokens: int) -> list[Record]:
    """From the request to its first token, on an idle engine."""
    seconds = sorted([_first_token(desk, tokens) for _ in range(FIRST_TOKENS + 1)][1:])
    middle = statistics.median(seconds)
    cost = prefill_on(desk.engine.model.config, desk.mesh, tokens, desk.precision)
    fraction = cost.limit(desk.ceilings) / middle
    spread = seconds[0] * 1e3, seconds[-1] * 1e3, len(seconds)
    return [Record(desk.case(f"prompt {tokens}"), OURS, "first token", middle * 1e3, "ms", fraction, *spread)]


def _first_token(desk: Desk, tokens: int) -> float:
    requests = desk.draw(1, tokens, NEW)
    start = desk.ask(requests)
    desk.hear_first(requests)
    seconds = desk.told - start
    desk.clear()
    return seconds


@dataclass(frozen=True)
class Gaps:
    """What a long prompt did, in seconds.

    Attributes:
        steady: of a decode step, program by program, before it came.
        beside: from what a program brought to what the next one did, which prefilled a part of it.
        first_token: of the prompt.
        device_steady, device_beside: the same programs but the first, on the device alone.
        chunks: rows of each of these steps that prefilled, and tokens before its chunk.
    """

    steady: list[float]
    beside: list[float]
    first_token: float
    device_steady: np.ndarray
    device_beside: np.ndarray
    chunks: list[tuple[int, int]]


def beside(desk: Desk, stall: Stall) -> list[Record]:
    """The time between tokens of those who decode, while the prompt comes and before, as the host sees it and on the
    device alone.

    Raises:
        ValueError: the engine decodes a step at a time, which looks like a step with prompts, or has no slot left.
    """
    if (slots := desk.engine.layout.slots) <= stall.decoding:
        raise ValueError(f"max_num_seqs = {slots} must be more than the {stall.decoding} sequences that decode")
    if (steps := desk.engine.options.steps_per_dispatch) < 2:
        raise ValueError(f"steps_per_dispatch = {steps} must be at least 2 to tell decode steps from steps of prompts")
    rounds = [_gaps(desk, stall) for _ in range(REPEATS + 1)][1:]
    case = desk.case(stall.name)
    first = sorted(gaps.first_token * 1e3 for gaps in rounds)
    seen, device = (
        [np.concatenate([getattr(gaps, name) for gaps in rounds]) for name in names]
        for names in (("steady", "beside"), ("device_steady", "device_beside"))
    )
    rows, cached = [chunk for gaps in rounds for chunk in gaps.chunks][int(device[1].argmax())]
    return [
        *_slowdown(case, "", *seen),
        *_slowdown(case, " on the device", *device),
        Record(case, OURS, "rows of the worst step on the device", rows, "rows"),
        Record(case, OURS, "tokens before its chunk", cached, "tokens"),
        Record(case, OURS, "first token", statistics.median(first), "ms", None, first[0], first[-1], len(first)),
    ]


def _slowdown(case: str, where: str, steady: np.ndarray, mixed: np.ndarray) -> list[Record]:
    """Of steps that prefill against decode steps, both in seconds; `where` they were timed."""
    step = float(np.median(steady))
    middle, p99, worst = (float(np.percentile(mixed, percent)) for percent in (50, 99, 100))
    spread = None, float(steady.min()) * 1e3, float(steady.max()) * 1e3, len(steady)
    return [
        Record(case, OURS, f"decode step{where}", step * 1e3, "ms", *spread),
        Record(case, OURS, f"step with the prompt{where} p50", middle * 1e3, "ms", samples=len(mixed)),
        Record(case, OURS, f"step with the prompt{where} p99", p99 * 1e3, "ms", samples=len(mixed)),
        Record(case, OURS, f"step with the prompt{where}, worst", worst * 1e3, "ms", samples=len(mixed)),
        Record(case, OURS, f"p99 over a decode step{where}", p99 / step, "x"),
        Record(case, OURS, f"worst over a decode step{where}", worst / step, "x"),
    ]


def _gaps(desk: Desk, stall: Stall) -> Gaps:
    runner, steps = desk.engine.runner, desk.engine.options.steps_per_dispatch
    room = desk.engine.layout.max_tokens - stall.context  # none who decodes ends meanwhile
    few, long = desk.draw(stall.decoding, stall.context, room), desk.draw(1, stall.prompt, NEW)
    desk.ask(few)
    desk.hear_first(few)
    for _ in range(SETTLE):
        desk.hear()
    at_first = replay.standing(runner)
    with replay.noted(runner, "loop") as loops:
        steady = [_gap(desk)[0] / steps for _ in range(STEADY)]
    before_prompt = replay.standing(runner)
    beside, brought = [], dict[int, int]()
    with replay.noted(runner, "step") as mixed:
        start = desk.ask(long)
        while long[0].id not in brought:
            gap, brought = _gap(desk)
            if brought[few[0].id] == 1:  # a program of decode steps brings more
                beside.append(gap)
    first_token = desk.told - start
    device_steady = replay.seconds(runner, runner.loop, loops, at_first) / steps
    device_beside = replay.seconds(runner, runner.step, mixed, before_prompt)
    desk.clear()
    return Gaps(steady, beside, first_token, device_steady, device_beside, [_chunk(given[0]) for given in mixed[1:]])


def _gap(desk: Desk) -> tuple[float, dict[int, int]]:
    """Seconds from what a program brought to what the next one does, and that: tokens by request."""
    before, brought = desk.told, desk.hear()
    return desk.told - before, brought


def _chunk(given: StepInput) -> tuple[int, int]:
    """Rows of a step with one chunk, and tokens before it."""
    first, end = np.asarray(given.starts_R1)[:2]
    return len(given.tokens_T), int(given.lengths_R[0] - (end - first))

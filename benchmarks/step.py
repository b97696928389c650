"""Where the time of a step goes: its kernels by class, from a profile, beside the least that each class could take.

    python -m benchmarks.step [--model llama-3-8b] [--batches 1 16 64 256] [--prompts 512 2048 8192] [--output DIR]

Writes `step.json` to the results of the device, with the cases of `benchmarks.decode`. Microseconds of one decode step
halfway through the new tokens, or of one prompt in a step of its own. The limit of a class is that of its parts in the
cost model; sampling and gaps have none. A norm, a gate or a residual that a matmul's kernel takes in counts as that
matmul, so that norms and glue may take less than their limit, and have no fraction of it.

A profile runs every kernel by its own launch, while XLA otherwise launches many at once. So the step is timed without
a profile (the median of three), and the gaps are that time minus the kernels': what the device waits, and on a step
with a prompt also the upload and the token's way to the host. They may come out below zero where kernels take less
time alone than beside a profiler, or run side by side.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from benchmarks.bench import GREEDY, Bench, Subject, load
from benchmarks.decode import NEW, PROMPT, REPEATS
from benchmarks.record import Record, arguments_of, environment, update
from benchmarks.step_classes import CLASSES, GAPS, GLUE, OTHER, PARTS, STEP, Event, Program, divide, read_program
from benchmarks.tables import TABLES, markdown
from jaxinfer.decode.sampling import needs
from jaxinfer.roofline import Cost, Hardware, decode_step, prefill

METRIC = TABLES["step"].metric


def profile(run: Callable[[], object]) -> list[Event]:
    """What the device does in `run`, which waits for it.

    Raises:
        RuntimeError: there is a GPU, and the profile shows nothing of it.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        events = [event for path in Path(folder).rglob("*.xplane.pb") for event in read_events(path)]
    if not events and jax.default_backend() == "gpu":
        raise RuntimeError("the profile shows nothing on the GPU; is CUPTI, of jax[cuda], installed and allowed?")
    return events


def read_events(path: Path) -> Iterator[Event]:
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines if "/device:GPU" in plane.name else ():
            for event in line.events if "Stream" in line.name else ():
                stats = dict(event.stats)
                op, module = str(stats.get("hlo_op", "")), str(stats.get("hlo_module", ""))
                yield Event(event.name, event.start_ns, event.duration_ns, op, module)


@dataclass(frozen=True)
class Case:
    """One case as measured.

    Attributes:
        step: seconds, without a profile.
        busy: nanoseconds of a step by class and kernel; empty without a GPU.
        cost: the least that the step must do.
    """

    name: str
    step: float
    busy: dict[tuple[str, str], float]
    cost: Cost


def run_decode(subject: Subject, batch: int) -> Case:
    bench = Bench(subject, batch, PROMPT + NEW + 1)
    lowered = bench.programs.lower_loop(
        subject.params, bench.state, bench.cache, np.arange(batch, dtype=np.int32), steps=subject.steps,
        needs=needs([GREEDY]),
    )  # fmt: skip
    programs = read_programs(lowered.compile())
    seconds = []
    for _ in range(REPEATS + 1):
        bench.prefill(PROMPT, PROMPT)
        seconds.append(bench.decode(NEW))
    bench.prefill(PROMPT, PROMPT)
    dispatches = NEW // subject.steps
    if dispatches > 2:  # the two in the middle see as long a context as all do on average
        bench.dispatch(dispatches // 2 - 1)
    profiled = min(2, dispatches)
    busy = divide(profile(lambda: bench.dispatch(profiled)), programs)
    cost = decode_step(subject.model.config, batch, PROMPT + NEW // 2, subject.precision)
    return Case(
        subject.case(f"B{batch}"), statistics.median(seconds[1:]) / NEW,
        {key: total / (profiled * subject.steps) for key, total in busy.items()}, cost,
    )  # fmt: skip


def run_prompt(subject: Subject, tokens: int) -> Case:
    bench = Bench(subject, 1, tokens + 1)
    (step,) = bench.admit(tokens, tokens)
    lowered = bench.programs.lower_step(subject.params, bench.state, bench.cache, step)
    programs = read_programs(lowered.compile())
    seconds = statistics.median([bench.prefill(tokens, tokens) for _ in range(REPEATS + 1)][1:])
    steps = bench.admit(tokens, tokens)
    jax.block_until_ready(bench.state)  # admitting is no part of the step
    busy = divide(profile(lambda: bench.run(steps)), programs)
    cost = prefill(subject.model.config, tokens, precision=subject.precision)
    return Case(subject.case(f"prompt {tokens}"), seconds, busy, cost)


def read_programs(compiled: jax.stages.Compiled) -> dict[str, Program]:
    """The program by the name of its module."""
    text = compiled.as_text() or ""
    return {text.split(maxsplit=2)[1].rstrip(","): read_program(text)}


def records(case: Case, ceilings: Hardware) -> list[Record]:
    """Time and limit of every class and of the whole step; of the step alone where no profile divides it."""
    spent: dict[str, float] = {}
    if case.busy:
        spent = dict.fromkeys(CLASSES, 0.0)
        for (kind, _), nanoseconds in case.busy.items():
            spent[kind] += nanoseconds / 1e9
        spent[GAPS] = case.step - sum(case.busy.values()) / 1e9
    limits = {
        kind: sum(case.cost.parts[part].limit(ceilings) for part in parts if part in case.cost.parts)
        for kind, parts in PARTS.items()
    }
    spent[STEP], limits[STEP] = case.step, case.cost.limit(ceilings)
    found = []
    for kind, seconds in spent.items():
        limit = limits.get(kind)
        fraction = limit / seconds if limit and seconds and kind != GLUE else None
        found.append(Record(case.name, kind, METRIC, seconds * 1e6, "us", fraction))
        if limit is not None:
            found.append(Record(case.name, kind, "limit", limit * 1e6, "us"))
    return found


def longest(case: Case, count: int) -> str:
    """The kernels that take most of a step, and all time of those that have no class."""
    lines = [
        f"  {nanoseconds / 1e3:10,.1f} us  {kind:18} {name[:80]}"
        for index, ((kind, name), nanoseconds) in enumerate(sorted(case.busy.items(), key=lambda item: -item[1]))
        if index < count or kind == OTHER
    ]
    return "\n".join([case.name, *lines])


def table(found: list[Record]) -> str:
    """Markdown of the cases in the records."""
    columns = {case: case for case in dict.fromkeys(record.case for record in found)}
    return markdown(replace(TABLES["step"], columns=columns), found)


def measure(subject: Subject, batches: list[int], prompts: list[int]) -> Iterator[Case]:
    for tokens in prompts:
        yield run_prompt(subject, tokens)
    for batch in batches:
        yield run_decode(subject, batch)


def main() -> None:
    parser = arguments_of("benchmarks.step", __doc__)
    parser.add_argument("--model", default="llama-3-8b", help="a folder of configs/models")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64, 256])
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--steps-per-dispatch", type=int, default=16)
    parser.add_argument("--kernels", type=int, default=12, help="how many of each case are printed")
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    arguments = parser.parse_args()
    subject = load(arguments.model, arguments.prompts, arguments.steps_per_dispatch)
    found, made_in = [], environment()
    for case in measure(subject, arguments.batches, arguments.prompts):
        found += records(case, subject.ceilings)
        path = update("step", made_in, found, [], arguments.output)  # a run cut short leaves what it has done
        print(longest(case, arguments.kernels), f"written to {path}", sep="\n", flush=True)
    print(table(found))


if __name__ == "__main__":
    main()

"""The kernels on named problems of real models, beside their peers.

    python -m benchmarks.kernels [--op ...] [--case ...] [--peers ...] [--quick] [--limit SECONDS] [--tune]

Writes `kernels.json` and the plot `kernels.png` to the results of the device. What the file holds of other cases or
implementations stays in it, with the environment that it was measured in. Other systems' figures, from
`kernel_anchors.json`, are shown as stated.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.kernels.measure import DEFAULT_L2, Bench, measure_cases
from benchmarks.kernels.op import OURS, Op
from benchmarks.kernels.ops import OPS
from benchmarks.kernels.plot import lines, plot_speeds
from benchmarks.kernels.timing import Effort
from benchmarks.kernels.tune import tune
from benchmarks.record import (
    MACHINE,
    RESULTS,
    Failure,
    Record,
    arguments_of,
    device_folder,
    environment,
    records_of,
    results_folder,
    update,
)
from jaxinfer.machine import measure_machine
from jaxinfer.roofline import MEASURED, Hardware, find_by_device

QUICK = Effort(seconds=0.005)
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


class Selection(NamedTuple):
    """A problem of an op, and the implementations to time on it."""

    op: Op
    problem: str
    implementations: tuple[str, ...]


def main(arguments: Sequence[str] | None = None, ops: Mapping[str, Op] = OPS) -> None:
    options = parse(arguments, ops)
    deadline = time.monotonic() + options.limit
    selected = select([ops[name] for name in options.op], options.case, options.peers, options.quick)
    machine = measure_machine()
    ceilings = find_by_device(machine.device_kind, MEASURED) or machine
    bench = Bench(ceilings, machine.l2 or DEFAULT_L2, QUICK if options.quick else Effort())
    if options.tune:
        tune_all(selected, bench, machine.device_kind, options.output, deadline)
        return
    folder = None if options.quick and not options.output else results_folder(options.output)
    measure_all(selected, bench, machine_records(machine), folder, deadline)
    if folder is not None and (folder / "kernels.json").exists():
        draw(ops.values(), ceilings, folder)
        print("written to", folder)


def parse(arguments: Sequence[str] | None, ops: Mapping[str, Op]) -> argparse.Namespace:
    parser = arguments_of("benchmarks.kernels", __doc__)
    peers = sorted({name for op in ops.values() for name in op.implementations} - {OURS})
    parser.add_argument("--op", nargs="+", choices=ops, metavar="OP", help=f"of {', '.join(ops)}")
    parser.add_argument(
        "--case", nargs="+", metavar="TEXT", help="only problems of these names, or with them in their names"
    )
    parser.add_argument(
        "--peers", nargs="*", choices=peers, metavar="NAME",
        help=f"what to time beside {OURS}, of {', '.join(peers)}; default: all but the reference",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few cases, short samples, no file without --output")
    parser.add_argument("--limit", type=float, default=math.inf, metavar="SECONDS", help="begin no case after them")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="time every config of our kernels and keep the best ones, in tuned.json of the op or in OUTPUT/<op>.json",
    )
    parser.add_argument("--output", type=Path, help="folder of what is written")
    options = parser.parse_args(arguments)
    options.op = options.op or [name for name, op in ops.items() if op.tuning or not options.tune] or [*ops]
    return options


def select(
    ops: Sequence[Op], texts: Sequence[str] | None, peers: Sequence[str] | None, quick: bool
) -> list[Selection]:
    """The cases that the command line asks for.

    Raises:
        SystemExit: there is none; the message lists those that there are.
    """
    selected = []
    for op in ops:
        for name, problem in op.problems.items():
            if matches(name, texts, op) if texts else not quick or name in op.quick:
                chosen = op.peers(problem) if peers is None else [peer for peer in peers if peer in op.implementations]
                selected.append(Selection(op, name, (*chosen, OURS)))
    if not selected:
        cases = [op.case(name) for op in ops for name in op.problems]
        raise SystemExit("\n".join([f"no case has any of {texts} in its name; there are", *cases]))
    return selected


def matches(name: str, texts: Sequence[str], op: Op) -> bool:
    """Whether a text is the problem's name, or a part of it that is no other problem's name."""
    return name in texts or any(text in name for text in texts if text not in op.problems)


def tune_all(selected: Sequence[Selection], bench: Bench, device: str, output: Path | None, deadline: float) -> None:
    """Tunes the ops of the selection on its problems.

    Raises:
        SystemExit: one of them has nothing to tune.
    """
    problems: dict[str, list[str]] = {}
    ops = {selection.op.name: selection.op for selection in selected}
    for op, problem, _ in selected:
        problems.setdefault(op.name, []).append(problem)
    if fixed := [name for name, op in ops.items() if op.tuning is None]:
        raise SystemExit(f"nothing to tune in {', '.join(fixed)}; choose others with --op")
    for name, op in ops.items():
        assert op.tuning is not None
        path = op.tuning.path if output is None else output / f"{name}.json"
        for text in tune(op, problems[name], bench, device, path, deadline):
            print(text, flush=True)
        print("written to", path)


def measure_all(
    selected: Sequence[Selection], bench: Bench, records: list[Record], folder: Path | None, deadline: float
) -> None:
    """Measures and shows every case. Writes after each, beside `records`: an end in the middle loses nothing."""
    stated, made_in, failures = read_stated(), environment(), []
    with Progress(*COLUMNS) as progress:
        task = progress.add_task("", total=sum(len(selection.implementations) for selection in selected))
        progress.update(task, description="compiling")
        left = len(selected)
        for op, problem, outcomes in measure_cases(selected, bench, deadline):
            left -= 1
            progress.update(task, description=op.case(problem))
            for outcome in outcomes:
                show(progress, describe(outcome))
                progress.advance(task)
                if isinstance(outcome, Failure):
                    failures.append(outcome)
                else:
                    records = [*records, *outcome]
            for record in stated:
                if record.case == op.case(problem):
                    show(progress, f"{record}; stated, not measured in this run")
            if folder is not None:
                update("kernels", made_in, records, failures, folder)
        if left:
            show(progress, f"the time is up; {left} cases are not measured")


def machine_records(machine: Hardware) -> list[Record]:
    return [
        Record(MACHINE, "measured", "bandwidth", machine.bandwidth / 1e12, "TB/s"),
        Record(MACHINE, "measured", "bf16 matmul", machine.rate("bf16") / 1e12, "TFLOP/s"),
    ]


def read_stated() -> list[Record]:
    """Figures of other systems on this device, which were measured elsewhere."""
    path = RESULTS / device_folder() / "kernel_anchors.json"
    return [Record(**record) for record in json.loads(path.read_text())["records"]] if path.exists() else []


def describe(outcome: list[Record] | Failure) -> str:
    """One line: time and its range, rates, and the fraction of the limit; or the reason why there are none."""
    if isinstance(outcome, Failure):
        return f"{outcome.case:48} {outcome.implementation:12} failed: {outcome.reason}"
    time, *rates = outcome
    speeds = " ".join(f"{rate.value:>9,.4g} {rate.unit}" for rate in rates)
    spread = f"({time.low:,.4g} to {time.high:,.4g})"
    figures = f"{time.value:>10,.4g} us {spread:20} {speeds} {time.roofline_fraction:>5.0%} of the limit"
    return f"{time.case:48} {time.implementation:12} {figures}"


def show(progress: Progress, text: str) -> None:
    progress.console.print(text, soft_wrap=True, markup=False, highlight=False)


def draw(ops: Iterable[Op], ceilings: Hardware, folder: Path) -> None:
    """Writes the plot of all that the file in `folder` holds, or says what it needs."""
    records = records_of(folder / "kernels.json")
    drawn = [op for op in ops if lines(op, records)]
    try:
        if drawn:
            plot_speeds(drawn, records, read_stated(), ceilings).savefig(folder / "kernels.png", dpi=120)
    except ModuleNotFoundError as error:
        print(f"no plot: {error}")


if __name__ == "__main__":
    main()

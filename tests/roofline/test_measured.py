"""The plan against what real cards did: each measured time beside what is predicted of it today."""

import json
import re
from dataclasses import dataclass, replace

import pytest

from benchmarks.decode import predicted_decode, predicted_prefill
from benchmarks.record import RESULTS, parts
from jaxinfer.model import ModelConfig
from jaxinfer.roofline import MEASURED, Hardware, Mesh, Precision, find_by_device

# The runs that the files hold: each with the ceilings of its own machine.
RUNS = {
    f"{path.parent.name} {path.stem} {number} {part['environment']['commit'][:7]}": part
    for path in sorted(RESULTS.glob("*/decode*.json"))
    for number, part in enumerate(parts(json.loads(path.read_text())))
}
NAME = re.compile(r"(\S+) (?:B|prompt )(\d+)(?: in chunks of (\d+))?(?: (?!on )(\w+))?(?: on (.+))?")  # of a case
# Commits whose predictions of prompts counted all tokens in the last layer to its end.
ALL_FINISHED = ("47ee2c4", "ae198ea")
H200_OVERHEAD = 1.9  # us, for the one run that was made before the overhead was timed


@dataclass(frozen=True)
class Case:
    """A time of one model on one card, in ms.

    Attributes:
        model: in configs/models.
        size: the batch of a decode step, or the tokens of a prompt.
        chunk: tokens of a prompt that a step took; None is all of them.
        precision: of weights and cache.
        planned: what the run says was predicted; None where that was before the overhead was timed, or for a prompt
            counted more than is computed now.
    """

    machine: Hardware
    model: str
    metric: str
    size: int
    chunk: int | None
    precision: Precision
    attention: str
    measured: float
    planned: float | None
    mesh: Mesh

    def predict(self, config: ModelConfig) -> float:
        if self.metric == "first token":
            steps = predicted_prefill(config, self.size, self.attention, self.precision, self.chunk, self.mesh)
        else:
            steps = [predicted_decode(config, self.size, self.attention, self.precision, self.mesh)]
        return sum(step.predict(self.machine) for step in steps) * 1e3


def values(run: str, case: str, metric: str) -> dict[str, float]:
    """Figures of a metric of a case, by implementation."""
    found = (record for record in RUNS[run]["records"] if (record["case"], record["metric"]) == (case, metric))
    return {record["implementation"]: record["value"] for record in found}


def machine(run: str) -> tuple[Hardware, bool]:
    """The run's device with the ceilings that were timed there, and whether the overhead was among them."""
    ceilings = {record["metric"]: record["value"] for record in RUNS[run]["records"] if record["case"] == "machine"}
    device = find_by_device(RUNS[run]["environment"]["device"])
    assert device is not None
    recorded = "kernel overhead" in ceilings
    assert recorded or run.startswith("h200 decode_xla ")
    overhead = ceilings.get("kernel overhead", H200_OVERHEAD) * 1e-6
    flops = {"bf16": ceilings["bf16 matmul"] * 1e12}
    known = find_by_device(RUNS[run]["environment"]["device"], MEASURED)
    assert known is not None
    return device.with_ceilings(ceilings["bandwidth"] * 1e12, flops, overhead, known.messages), recorded


def mesh_named(name: str | None) -> Mesh:
    """As a case's name has it: `pipe 2 x tensor 2`."""
    sizes = (axis.split() for axis in name.split(" x ")) if name else ()
    return Mesh(**{axis: int(size) for axis, size in sizes})


def cases(metric: str) -> list:
    """Every measured time of `metric` as a `Case`."""
    found = []
    for run, content in RUNS.items():
        hardware, recorded = machine(run)
        for name in dict.fromkeys(record["case"] for record in content["records"] if record["metric"] == metric):
            figures = values(run, name, metric)
            planned = next(figures.pop(plan) for plan in list(figures) if plan.startswith("plan"))
            ((attention, measured),) = figures.items()
            model, size, chunk, cache, mesh = NAME.fullmatch(name).groups()
            counted_more = metric == "first token" and run.endswith(ALL_FINISHED)
            as_today = recorded and not counted_more
            case = Case(
                hardware, model, metric, int(size), chunk and int(chunk), Precision(cache=cache or "bf16"), attention,
                measured, planned if as_today else None, mesh_named(mesh),
            )  # fmt: skip
            found.append(pytest.param(case, id=f"{run} {name}"))
    return found


def memory(metric: str) -> list:
    """Planned and measured bytes of every case."""
    found = []
    for run, content in RUNS.items():
        for name in dict.fromkeys(record["case"] for record in content["records"]):
            figures = values(run, name, metric)
            if "device" in figures:
                planned = next(value for plan, value in figures.items() if plan.startswith("plan"))
                found.append(pytest.param(planned, figures["device"], id=f"{run} {name} {metric}"))
    return found


@pytest.mark.parametrize("case", cases("decode step") + cases("first token"))
def test_predicted_times(request, published, case):
    predicted = case.predict(published(case.model))
    assert predicted == pytest.approx(case.measured, rel=0.2)
    if case.planned is not None:
        assert predicted == pytest.approx(case.planned, rel=1e-3)


@pytest.mark.parametrize("case", cases("decode step") + cases("first token"))
def test_predicted_times_with_the_measured_entry(request, published, case):
    """As `jaxinfer plan --hardware h200-measured` predicts them, before any run."""
    machine = find_by_device(case.machine.device_kind, MEASURED)
    assert machine is not None
    assert replace(case, machine=machine).predict(published(case.model)) == pytest.approx(case.measured, rel=0.2)


@pytest.mark.parametrize("device", ["h200", "h100-80gb-hbm3"])
def test_the_measured_entry_has_the_overhead_that_a_run_timed(device):
    timed = {machine(run)[0].overhead: machine(run)[0].device_kind for run in RUNS if run.startswith(f"{device} ")}
    (kind,) = set(timed.values())
    entry = find_by_device(kind, MEASURED)
    assert entry is not None
    assert any(entry.overhead == pytest.approx(overhead, rel=0.01) for overhead in timed)


@pytest.mark.parametrize(("planned", "measured"), memory("memory in use") + memory("memory at peak"))
def test_planned_memory(planned, measured):
    assert planned == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.json")), ids=lambda path: f"{path.parent.name} {path.stem}")
def test_nothing_is_faster_than_its_limit(path):
    fractions = [record.get("roofline_fraction") for record in json.loads(path.read_text())["records"]]
    assert all(0 < fraction <= 1 for fraction in fractions if fraction is not None)


def test_something_was_compared():
    assert len(cases("decode step")) >= 12
    assert len(cases("first token")) >= 4
    assert len(memory("memory in use")) >= 12
    assert memory("memory at peak")

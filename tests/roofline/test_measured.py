"""The plan against what real cards did: the committed results hold both, side by side."""

import json

import pytest

from benchmarks.record import RESULTS

FILES = {
    f"{path.parent.name} {path.stem}": json.loads(path.read_text())["records"]
    for path in sorted(RESULTS.glob("*/decode*.json"))
}


def pairs(metric: str, found_by: str | None = None) -> list:
    """Planned and measured figures of a metric, by file and case; measured by whichever attention ran, or as named."""
    found = []
    for file, records in FILES.items():
        by_case: dict[str, dict[bool, float]] = {}
        for record in records:
            planned = record["implementation"].startswith("plan")
            if record["metric"] == metric and (planned or found_by in (None, record["implementation"])):
                by_case.setdefault(record["case"], {})[planned] = record["value"]
        found += [pytest.param(of[True], of[False], id=f"{file} {case}") for case, of in by_case.items()]
    return found


@pytest.mark.parametrize(("planned", "measured"), pairs("decode step"))
def test_predicted_decode_steps(planned, measured):
    assert planned == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize(("planned", "measured"), pairs("first token"))
def test_predicted_first_tokens(planned, measured):
    assert planned == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize(("planned", "measured"), pairs("memory in use", "device"))
def test_planned_memory(planned, measured):
    assert planned == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.json")), ids=lambda path: f"{path.parent.name} {path.stem}")
def test_nothing_is_faster_than_its_limit(path):
    fractions = [record.get("roofline_fraction") for record in json.loads(path.read_text())["records"]]
    assert all(0 < fraction <= 1 for fraction in fractions if fraction is not None)


def test_something_was_compared():
    assert len(pairs("decode step")) >= 4
    assert len(pairs("first token")) >= 3
    assert len(pairs("memory in use", "device")) >= 4

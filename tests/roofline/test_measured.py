"""The plan against what one H200 did: the committed results hold both, side by side."""

import json
from collections.abc import Iterator

import pytest

from benchmarks.record import RESULTS, Record, report

RECORDS = json.loads((RESULTS / "h200" / "decode.json").read_text())["records"]


def value(case: str, implementation: str, metric: str) -> float:
    (found,) = (
        record["value"]
        for record in RECORDS
        if (record["case"], record["implementation"], record["metric"]) == (case, implementation, metric)
    )
    return found


def ours(case: str, metric: str) -> float:
    """The measured figure, whichever attention ran."""
    (found,) = (
        r["implementation"]
        for r in RECORDS
        if (r["case"], r["metric"]) == (case, metric) and r["implementation"] != "plan"
    )
    return value(case, found, metric)


def cases(metric: str) -> list[str]:
    return [r["case"] for r in RECORDS if r["metric"] == metric and r["implementation"] == "plan"]


@pytest.mark.parametrize("case", cases("decode step"))
def test_predicted_decode_steps(case):
    assert value(case, "plan", "decode step") == pytest.approx(ours(case, "decode step"), rel=0.2)


@pytest.mark.parametrize("case", cases("first token"))
def test_predicted_first_tokens(case):
    assert value(case, "plan", "first token") == pytest.approx(ours(case, "first token"), rel=0.2)


@pytest.mark.parametrize("case", cases("memory in use"))
def test_planned_memory(case):
    assert value(case, "plan", "memory in use") == pytest.approx(value(case, "device", "memory in use"), rel=0.05)


def test_something_was_compared():
    assert len(cases("decode step")) >= 4
    assert len(cases("first token")) >= 3
    assert len(cases("memory in use")) >= 4


def test_every_record_is_printed_once_as_it_comes_whatever_a_case_brings(capsys):
    bandwidth = Record("a card", "measured", "bandwidth", 4.052, "TB/s")
    decode = Record("b", "xla", "decode", 225.8, "tok/s", 0.748)
    step = Record("b", "plan", "decode step", 4.676, "ms")
    printed = []

    def measured() -> Iterator[list[Record]]:
        for group in ([bandwidth], [decode, step]):
            yield group
            printed.append([" ".join(line.split()) for line in capsys.readouterr().out.splitlines()])

    assert report(measured()) == [bandwidth, decode, step]
    assert printed == [
        ["a card measured bandwidth 4.052 TB/s"],
        ["b xla decode 225.8 tok/s 75% of the limit", "b plan decode step 4.676 ms"],
    ]

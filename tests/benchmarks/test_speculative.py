"""The benchmark of speculation, on small models."""

import pytest

from benchmarks import speculative
from benchmarks.speculative import MissedExit, MissedLookup
from benchmarks.tables import TABLES
from tests.benchmarks.test_decode import subject
from tests.engine.tiny import CONFIG, ONE_LAYER


@pytest.mark.parametrize(
    ("method", "by", "config"), [(MissedLookup(), "", ONE_LAYER), (MissedExit(), " by early-exit", CONFIG)]
)
def test_the_cost_of_verifying_stands_beside_the_plan(monkeypatch, method, by, config):
    monkeypatch.setattr(speculative, "PROMPT", 5)
    records = speculative.verifying(subject("auto", config=config), 2, method, drafts=[3], new=4, rounds=1)
    value = {(record.case, record.implementation, record.metric): record.value for record in records}
    assert value.keys() == {
        ("tiny B2 plain", "xla", "step"),
        ("tiny B2 plain", "plan with XLA attention", "step"),
        *(
            (f"tiny B2 3 drafts{by}", implementation, metric)
            for implementation in ("xla", "plan with XLA attention")
            for metric in ("step", "over a plain step")
        ),
    }
    for implementation in ("xla", "plan with XLA attention"):
        step, plain = (value[f"tiny B2 {kind}", implementation, "step"] for kind in (f"3 drafts{by}", "plain"))
        assert value[f"tiny B2 3 drafts{by}", implementation, "over a plain step"] == pytest.approx(step / plain)


def test_the_table_of_costs_has_the_cases_that_are_measured():
    options = speculative.parse(["verification"])
    cases = {f"{options.model} B{batch} {count} drafts" for batch in options.batches for count in options.drafts}
    assert set(TABLES["verification"].columns) == cases
    assert TABLES["verification"].metric == speculative.OVER

"""The benchmark of the all-reduce, on virtual devices, where XLA's is the only one."""

import json

import numpy as np
import pytest

from benchmarks import all_reduce as benchmark
from benchmarks.all_reduce import Case
from jaxinfer.parallel import make_mesh

SMALL = ["--tokens", "1", "--hidden", "256", "--calls", "2"]


def test_times_of_every_size_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "SECONDS", 0.0)
    benchmark.main([*SMALL, "--implementations", "xla", "--output", str(tmp_path)])
    records = json.loads((tmp_path / "all_reduce.json").read_text())["records"]
    assert [(record["case"], record["implementation"], record["unit"]) for record in records] == [
        ("256 B", "xla", "us"), ("512 B", "xla", "us"), ("sum 512 B", "xla", "us")
    ]  # fmt: skip
    assert all(0 < record["low"] <= record["value"] <= record["high"] for record in records)


def test_what_cannot_run_here_is_kept_as_a_failure(tmp_path, capsys):
    """The kernel needs GPUs."""
    benchmark.main([*SMALL, "--implementations", "mosaic_gpu", "--limit", "20", "--output", str(tmp_path)])
    written = json.loads((tmp_path / "all_reduce.json").read_text())
    assert written["records"] == []
    assert written["failures"]
    assert "failed" in capsys.readouterr().out


def test_a_wrong_sum_or_one_that_differs_between_devices_is_refused():
    case = Case(1, 256, False)
    arguments = case.arguments(make_mesh(2))
    right = np.stack([np.asarray(arguments[0], np.float32).sum(axis=0)] * 2)
    benchmark.check(case, right, arguments)
    with pytest.raises(ValueError, match="differs from the sum"):
        benchmark.check(case, right * 1.5, arguments)
    right[1, 0, 0] += 1e-3
    with pytest.raises(ValueError, match="not the same on all devices"):
        benchmark.check(case, right, arguments)

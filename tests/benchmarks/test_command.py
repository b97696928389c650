"""The command from its arguments to its files."""

import json
import sys
from dataclasses import replace

import pytest

from benchmarks import record
from benchmarks.kernels import __main__ as command
from benchmarks.kernels.measure import measure_case, start_case
from benchmarks.kernels.ops import attention
from benchmarks.kernels.plot import lines, plot_speeds
from benchmarks.record import Failure, Record, parts, update
from tests.benchmarks.tiny import BENCH, MACHINE, TINY

pytestmark = pytest.mark.usefixtures("short_programs")


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch):
    monkeypatch.setattr(command, "measure_machine", lambda: MACHINE)
    monkeypatch.setattr(command, "Effort", lambda: BENCH.effort)


def selected(arguments: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    options = command.parse(arguments, TINY)
    found = command.select([TINY[name] for name in options.op], options.case, options.peers, options.quick)
    return [(op.case(problem), implementations) for op, problem, implementations in found]


def test_the_command_line_selects():
    everything = selected([])
    assert len(everything) == sum(len(op.problems) for op in TINY.values())
    assert all("reference" not in implementations for _, implementations in everything)
    assert selected(["--op", "flash_attention", "--case", "window", "shuffled"]) == [
        ("flash_attention small 2x32 shuffled", ("cudnn_paged", "mosaic_gpu")),
        ("flash_attention small 1x48 window", ("xla", "cudnn", "mosaic_gpu")),
    ]
    assert selected(["--case", "int8", "--peers", "reference", "xla"]) == [
        ("flash_decoding small 2x32 int8", ("reference", "xla", "mosaic_gpu"))
    ]
    assert len(selected(["--op", "flash_attention", "--case", "2x32"])) == 2
    assert len(selected(["--op", "flash_attention", "--case", "small 2x32"])) == 1  # a whole name
    assert selected(["--quick", "--peers"]) == [
        ("flash_attention small 2x32", ("mosaic_gpu",)),
        ("flash_decoding small 2x32", ("mosaic_gpu",)),
    ]


def test_a_case_that_is_not_there_ends_with_the_names():
    with pytest.raises(SystemExit, match=r"(?s)any of .'9x9'.*flash_decoding small 2x32 int8"):
        selected(["--case", "9x9"])


def test_runs_write_figures_failures_and_the_plot(tmp_path, capsys, monkeypatch):
    stated = Record("flash_decoding small 2x32", "another system", "traffic", 3.5, "TB/s", 0.77)
    monkeypatch.setattr(command, "read_stated", lambda: [stated])
    output = ["--output", str(tmp_path)]
    command.main(["--case", "int8", "fp8", "--peers", "reference", "cudnn", *output], TINY)
    command.main(["--quick", "--peers", "xla", *output], TINY)
    content = json.loads((tmp_path / "kernels.json").read_text())
    records = [Record(**entry) for entry in content["records"]]
    timed = [found for found in records if found.metric == "time"]
    assert [(found.case, found.implementation) for found in timed] == [
        ("flash_decoding small 2x32 int8", "reference"),
        ("flash_decoding small 2x32 fp8", "reference"),
        ("flash_attention small 2x32", "xla"),
        ("flash_decoding small 2x32", "xla"),
    ]
    assert all(found.low <= found.value <= found.high for found in timed)
    assert "device" in content["environment"]
    failed = {(entry["case"], entry["implementation"]): entry["reason"] for entry in content["failures"]}
    assert failed["flash_decoding small 2x32 int8", "cudnn"] == "cuDNN in JAX takes no quantized cache"
    assert len(failed) == 6  # and ours in every case, without a GPU
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "cudnn        failed: cuDNN in JAX takes no quantized cache\n" in printed
    assert "3.5 TB/s     77% of the limit; stated, not measured in this run\n" in printed


def test_a_quick_run_leaves_the_results_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    command.main(["--quick", "--op", "flash_decoding", "--peers"], TINY)
    assert [*tmp_path.iterdir()] == []


def test_the_time_limit_ends_a_run_between_cases(tmp_path, capsys):
    command.main(["--limit", "0", "--output", str(tmp_path)], TINY)
    assert f"the time is up; {len(selected([]))} cases are not measured" in capsys.readouterr().out
    assert [*tmp_path.iterdir()] == []


def test_tokamax_is_a_peer_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: name)
    assert selected(["--case", "window"])[0][1] == ("xla", "cudnn", "tokamax", "mosaic_gpu")


def test_a_plot_without_matplotlib_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    records = [Record("flash_decoding small 2x32", "xla", "traffic", 3.0, "TB/s", 0.66)]
    update("kernels", {"device": "a card"}, records, [], tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    command.draw(TINY.values(), MACHINE, tmp_path)
    assert "pip install 'jaxinfer[plots]'" in capsys.readouterr().out
    assert not (tmp_path / "kernels.png").exists()


def test_the_plot_has_a_line_for_each_implementation():
    op = TINY["flash_attention"]
    records = [
        Record(op.case(name), implementation, metric, value, unit)
        for name, value in (("small 1x48 window", 500.0), ("small 2x32", 400.0), ("small 2x32 shuffled", 1.0))
        for implementation in ("xla", "mosaic_gpu")
        for metric, unit in (("arithmetic", "TFLOP/s"), ("traffic", "TB/s"))
    ]
    assert lines(op, records) == {name: ([32, 48], [400.0, 500.0]) for name in ("xla", "mosaic_gpu")}
    stated = [Record(op.case("small 2x32"), "another system", "arithmetic", 600.0, "TFLOP/s")]
    (axes,) = plot_speeds([op], records, stated, MACHINE).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["xla", "mosaic_gpu", "another system (stated)", "limit of a small machine"]


def entry(case: str, value: float, implementation: str = "xla") -> Record:
    return Record(case, implementation, "time", value, "us", 0.5, value - 1, value + 1)


def test_a_file_keeps_what_a_run_did_not_measure_again(tmp_path):
    old, new = {"commit": "old"}, {"commit": "new"}
    update("kernels", old, [entry("a", 1), entry("b", 2)], [Failure("c", "xla", "no room")], tmp_path)
    path = update("kernels", new, [entry("b", 3), entry("a", 4, "cudnn")], [], tmp_path)
    first, earlier = parts(json.loads(path.read_text()))
    assert (first["environment"], earlier["environment"]) == (new, old)
    assert [Record(**record) for record in first["records"]] == [entry("b", 3), entry("a", 4, "cudnn")]
    assert [Record(**record) for record in earlier["records"]] == [entry("a", 1)]
    assert [Failure(**failure) for failure in earlier["failures"]] == [Failure("c", "xla", "no room")]
    # The same run goes on: what it has measured stays beside what comes.
    update("kernels", new, [entry("d", 5)], [Failure("a", "xla", "broken")], tmp_path)
    first, earlier = parts(json.loads(path.read_text()))
    assert [record["case"] for record in first["records"]] == ["b", "a", "d"]
    assert [failure["case"] for failure in first["failures"]] == ["a"]
    assert earlier["records"] == []
    # Nothing is left of a part whose every figure is measured again.
    update("kernels", new, [entry("c", 6)], [], tmp_path)
    assert len(parts(json.loads(path.read_text()))) == 1


def test_what_the_machine_was_timed_at_stays_with_the_figures_of_its_run(tmp_path):
    old, new = {"commit": "old"}, {"commit": "new"}
    update("decode", old, [entry("machine", 1), entry("a", 1), entry("b", 2)], [], tmp_path)
    path = update("decode", new, [entry("machine", 2), entry("b", 3)], [], tmp_path)
    first, earlier = parts(json.loads(path.read_text()))
    assert [Record(**record) for record in first["records"]] == [entry("machine", 2), entry("b", 3)]
    assert [Record(**record) for record in earlier["records"]] == [entry("machine", 1), entry("a", 1)]
    update("decode", new, [entry("machine", 3), entry("a", 4)], [], tmp_path)
    (part,) = parts(json.loads(path.read_text()))
    assert [record["value"] for record in part["records"]] == [3, 3, 4]


def test_a_failure_takes_the_place_of_an_old_figure(tmp_path):
    op = replace(TINY["flash_decoding"], implementations={"xla": lambda problem: 1 / 0})
    update("kernels", {}, [entry("flash_decoding small 2x32", 1)], [], tmp_path)
    path = update("kernels", {}, [], [*measure_case(start_case(op, "small 2x32", ["xla"], BENCH), BENCH)], tmp_path)
    (part,) = parts(json.loads(path.read_text()))
    assert (part["records"], part["failures"][0]["reason"]) == ([], "ZeroDivisionError: division by zero")

"""The README's tables of the kernels, from a fixture, and other systems' figures in them."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.bench import MODELS
from benchmarks.kernels.ops import OPS
from benchmarks.record import RESULTS, Failure, Record, update
from benchmarks.serving.__main__ import warm_up_records
from benchmarks.serving.workload import WORKLOADS
from benchmarks.tables import TABLES, render
from jaxinfer.engine import Warmed, WarmUp
from jaxinfer.model import read_config
from jaxinfer.roofline import Work, find_hardware, workload_limit

TEXT = "".join(f"<!-- table: {name} -->\n<!-- /table -->\n" for name in (*TABLES, "sources"))
SHOWN = """\
| decoding, us | 1x8192 | 1x131072 | 16x8192 | 64x4096 | 128x2048 | 256x256 |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| **jaxinfer** | 15.2 (49%) |  |  | 245 (97%) |  |  |
| cuDNN in JAX, contiguous |  |  |  | 257 (92%) |  |  |
| FlashAttention-3 |  |  |  | 263 (90%) |  |  |
| **jaxinfer**, pages of 16 |  |  |  | 250 (95%) |  |  |
"""


def time(name: str, implementation: str, value: float, fraction: float) -> Record:
    return Record(f"flash_decoding llama-3-8b {name}", implementation, "time", value, "us", fraction, value, value)


def write_results(folder: Path) -> None:
    anchors = [time("64x4096", "FlashAttention-3", 263, 0.899)]
    update("kernel_anchors", {"what": "stated figures"}, anchors, [], folder)
    old = [time("64x4096", "cudnn", 257, 0.92), time("64x4096", "mosaic_gpu", 300, 0.79)]
    update("kernels", {"commit": "old"}, old, [], folder)
    new = [
        time("64x4096 pages of 16", "mosaic_gpu", 250, 0.946),
        time("64x4096", "mosaic_gpu", 245, 0.971),
        time("1x8192", "mosaic_gpu", 15.2, 0.486),
        Record("machine", "measured", "bandwidth", 4.5, "TB/s"),
    ]
    update("kernels", {"commit": "new"}, new, [Failure("flash_decoding llama-3-8b 1x8192", "cudnn", "no")], folder)


def test_the_kernels_tables_follow_their_file(tmp_path):
    write_results(tmp_path)
    rendered = render(TEXT, tmp_path)
    assert f"<!-- table: decoding-kernel -->\n{SHOWN}<!-- /table -->" in rendered
    assert "<!-- table: prefill-kernel -->\n<!-- /table -->" in rendered
    assert "- commit new\n- commit old\n- stated figures\n" in rendered
    assert render(rendered, tmp_path) == rendered


def test_other_systems_stand_only_beside_our_own_figures(tmp_path):
    write_results(tmp_path)
    (tmp_path / "kernels.json").unlink()
    assert render(TEXT, tmp_path) == TEXT


def test_a_title_says_that_keys_in_one_piece_were_gathered(tmp_path):
    name = "flash_attention llama-3-8b 4x2048"
    records = [
        Record(name + case, implementation, "arithmetic", 500, "TFLOP/s")
        for case in ("", " shuffled")
        for implementation in ("mosaic_gpu", "cudnn", "cudnn_paged")
    ]
    update("kernels", {"commit": "new"}, records, [], tmp_path)
    rendered = render("<!-- table: prefill-kernel -->\n<!-- /table -->\n", tmp_path)
    titles = re.findall(r"^\| (\S.*?) \| 500 ", rendered, re.MULTILINE)
    assert titles == [
        "**jaxinfer**",
        "cuDNN in JAX, contiguous",
        "cuDNN in JAX, paged",
        "**jaxinfer**, shuffled pages of 64",
        "cuDNN in JAX, contiguous, gathered beforehand from shuffled pages of 64",
        "cuDNN in JAX, paged, shuffled pages of 64",
    ]


def test_serving_has_tables_of_its_own_and_rows_beside_single_programs(tmp_path):
    case, stall = "llama-3-8b 32 x 8192 in, 64 out", "llama-3-8b prompt 32768 beside 16"
    rate = "throughput in and out"
    stated = [Record(case, "vLLM 0.24", rate, 34459, "tok/s", 0.836)]
    update("serving_anchors", {"what": "stated figures"}, stated, [], tmp_path)
    marks = "".join(
        f"<!-- table: {name} -->\n<!-- /table -->\n" for name in ("throughput", "beside-a-prompt", "decode")
    )
    assert render(marks, tmp_path) == marks  # others stand beside our own alone
    ours = [
        Record("soak of 10", "jaxinfer", "pages lost", 0, "pages"),
        Record("llama-3-8b B16", "jaxinfer", "decode", 2500, "tok/s", 0.8),
        Record(case, "jaxinfer", "output throughput", 270, "tok/s", 0.8),
        Record(case, "jaxinfer", rate, 35000, "tok/s", 0.85),
        *(
            Record("qwen3-0.6b 1024 requests", name, "output throughput", value, "tok/s")
            for name, value in (("jaxinfer, static batching", 5000), ("jaxinfer", 11000))
        ),
        Record(stall, "jaxinfer", "decode step", 6.5, "ms"),
        Record(stall, "jaxinfer", "worst over a decode step", 1.9, "x"),
        Record(stall, "jaxinfer", "worst over a decode step on the device", 1.8, "x"),
    ]
    update("serving", {"commit": "new"}, ours, [], tmp_path)
    rows = [line.split(" | ") for line in render(marks, tmp_path).splitlines() if line.startswith("| ")]
    shown = {row[0].strip("| "): [cell.strip(" |") for cell in row[1:]] for row in rows if "---" not in row[0]}
    assert shown["**jaxinfer**, static batching"] == ["", "", "5,000", "", "", ""]
    assert shown["vLLM 0.24"] == ["", "", "", "", "34,459 (84%)", ""]
    assert shown["**jaxinfer**, through the engine"] == ["", "2,500 (80%)", "", ""]
    ours = [[cell.strip(" |") for cell in row[1:]] for row in rows if row[0] == "| **jaxinfer**"]
    assert ours == [["", "", "11,000", "", "35,000 (85%)", ""], ["6.5", "", "", "", "1.9", "1.8", ""]]


def test_serving_columns_are_cases():
    """As the benchmark names them."""
    workloads = {f"{folder.name} {name}" for folder in MODELS.iterdir() for name in WORKLOADS}
    assert {case for case, _ in TABLES["throughput"].places()} <= workloads
    for found in (0, 1):
        done = WarmUp((Warmed("a program", 1.0, 1.0, 1, found),), 1.0, 0)
        made = {(record.case, record.metric) for record in warm_up_records("llama-3-8b", done)}
        assert len(made & {*TABLES["warm-up"].places()}) == 3 - 2 * found


@pytest.mark.parametrize("name", TABLES)
def test_columns_and_rows_are_cases(name):
    """A title for a case that is never measured would be an empty cell for ever."""
    cases = {op.case(problem) for op in OPS.values() for problem in op.problems}
    columns = {case for case in TABLES[name].columns if case.partition(" ")[0] in OPS}
    for variant in TABLES[name].variants:
        assert not columns or {case + variant for case in columns} & cases
    assert columns <= {case.removesuffix(variant) for case in cases for variant in TABLES[name].variants}


def test_fractions_of_other_systems_are_those_of_the_problems():
    machine = find_hardware("h200-measured")
    problems = {op.case(name): problem for op in OPS.values() for name, problem in op.problems.items()}
    seconds = {
        "us": lambda problem, value: value * 1e-6,
        "TB/s": lambda problem, value: problem.bytes / value / 1e12,
        "TFLOP/s": lambda problem, value: problem.flops / value / 1e12,
    }
    for entry in json.loads((RESULTS / "h200" / "kernel_anchors.json").read_text())["records"]:
        record = Record(**entry)
        problem = problems[record.case]
        taken = seconds[record.unit](problem, record.value)
        limit = Work(flops=problem.flops, cache=problem.bytes).limit(machine)
        # Their times are stated in whole microseconds.
        assert record.roofline_fraction == pytest.approx(limit / taken, rel=0.02), record


def test_fractions_of_other_systems_are_those_of_the_workloads():
    config, machine = read_config(MODELS / "llama-3-8b"), find_hardware("h200-measured")
    for entry in json.loads((RESULTS / "h200" / "serving_anchors.json").read_text())["records"]:
        record = Record(**entry)
        sizes = WORKLOADS[record.case.removeprefix("llama-3-8b ")].sizes
        tokens = sum(output + (record.metric == "throughput in and out") * prompt for prompt, output in sizes)
        limit = workload_limit(config, machine, sizes)
        assert record.roofline_fraction == pytest.approx(limit * record.value / tokens, rel=1e-3), record

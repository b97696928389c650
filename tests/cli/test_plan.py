import io
import json
import re
import sys

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from jaxinfer.cli.models import MODELS, find_model
from jaxinfer.cli.plan import plan
from jaxinfer.cli.plan_tables import plan_tables
from jaxinfer.cli.units import si
from jaxinfer.roofline import DATASHEETS, Mesh, Precision, decode_step, find_hardware, make_plan, prefill
from jaxinfer.roofline.precision import BITS

app = typer.Typer()
app.command()(plan)


def run(*arguments: str, columns: str = "200"):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": columns, "TERM": "dumb", "NO_COLOR": "1"})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4.54e12, "4.54 TB/s"),
        (999.6e9, "1.00 TB/s"),
        (131072, "131 kB/s"),
        (15.04e9, "15.0 GB/s"),
        (2.5e-5, "25.0 µB/s"),
        (3.4e-9, "3.40 nB/s"),
        (0, "0 B/s"),
        (-7.69e9, "-7.69 GB/s"),
    ],
)
def test_quantities_have_three_digits_and_a_prefix(value, text):
    assert si(value, "B/s") == text


def test_a_plan_that_fits_is_printed_with_its_figures():
    result = run("llama-3-8b", "--hardware", "h200", "--batch", "64", "--context", "4096")
    assert result.exit_code == 0, result.output
    assert "8,030,261,248" in result.output
    assert "34.4 GB needed" in result.output  # 64 x 4096 tokens of 131,072 bytes
    assert "fit: yes" in result.output
    assert "bound by memory" in result.output


def test_a_plan_that_does_not_fit_says_by_how_much_and_exits_with_1():
    result = run("llama-3-8b", "--hardware", "l4", "--batch", "64", "--context", "4096")
    assert result.exit_code == 1
    assert "34.4 GB needed" in result.output
    fitting = re.search(r"(\d+) x 4,096 fit: no", result.output)
    assert fitting
    assert 0 < int(fitting[1]) < 64
    assert run("llama-3-8b", "--hardware", "l4", "--batch", fitting[1]).exit_code == 0


def test_weights_that_are_too_large_are_named():
    result = run("llama-3-70b", "--hardware", "h100", "--context", "128")
    assert result.exit_code == 1
    assert "none left, for weights and activations alone are" in result.output
    assert run("llama-3-70b", "--hardware", "h100", "--context", "128", "--weights", "int4").exit_code == 0
    assert run("llama-3-70b", "--hardware", "h100", "--context", "128", "--tensor-parallel-size", "4").exit_code == 0
    assert run("llama-3-70b", "--hardware", "h100", "--context", "128", "--tensor-parallel", "4").exit_code == 0


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, hardware in DATASHEETS.items() for dtype in hardware.flops]
)
def test_every_card_has_a_plan_with_every_matmul_that_it_has(name, dtype):
    wide = dtype if BITS[dtype] >= 16 else next(other for other in DATASHEETS[name].flops if BITS[other] >= 16)
    formats = ["--weights", dtype, "--cache", wide, "--activations", dtype]
    result = run("llama-3.2-1b", "--hardware", name, *formats)
    assert result.exit_code == 0, result.output
    assert "fit: yes" in result.output


def test_a_model_in_fp16_has_a_plan_on_a_t4():
    options = ["--hardware", "t4", "--weights", "fp16", "--cache", "fp16"]
    result = run("llama-3.2-1b", *options)
    assert result.exit_code == 0, result.output
    assert "65.0 TFLOP/s" in result.output
    assert run("llama-3.2-1b", *options, "--activations", "fp16").output == result.output


def test_here_is_the_measured_machine(monkeypatch):
    monkeypatch.setattr("jaxinfer.machine.measure_machine", lambda: find_hardware("h200-measured"))
    result = run("llama-3.2-1b", "--hardware", "here")
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM on h200-measured" in result.output
    assert "for each kernel, decode is expected at" in result.output


@pytest.mark.parametrize("arguments", [["no-such-model"], ["llama-3-8b", "--weights", "bf15"]])
def test_model_and_dtypes_are_checked_before_the_machine_is_measured(monkeypatch, arguments):
    measured = []
    monkeypatch.setattr("jaxinfer.machine.measure_machine", lambda: measured.append(1))
    assert run(*arguments, "--hardware", "here").exit_code == 2
    assert not measured


@pytest.mark.parametrize("attention", ["flash", "materialized"])
def test_the_attention_is_that_of_the_prediction(attention):
    config, machine = find_model("llama-3-8b"), find_hardware("h200-measured")
    step = decode_step(config, 64, 4096, attention=attention).predict(machine)
    first = prefill(config, 4096, attention=attention).predict(machine)
    options = ["--hardware", "h200-measured", "--batch", "64", "--attention", attention]
    said = " ".join(run("llama-3-8b", *options).output.split())
    assert f"expected at {64 / step:,.0f} tokens/s ({si(step, 's')} a step) and the first token after" in said
    assert f"the first token after {si(first, 's')}." in said


def test_a_folder_a_file_and_a_name_give_the_same_model(tmp_path):
    text = (MODELS / "llama-3.2-1b" / "config.json").read_text()
    (tmp_path / "config.json").write_text(text)
    by_name = find_model("llama-3.2-1b")
    assert find_model(str(tmp_path)) == find_model(str(tmp_path / "config.json")) == by_name


def test_every_model_of_the_repository_can_be_planned():
    folders = sorted(folder.name for folder in MODELS.iterdir())
    assert folders
    for name in folders:
        made = make_plan(find_model(name), find_hardware("h200"), 1, 512, Precision(), Mesh(tensor=2))
        assert made.memory.fits, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "model is 'no-such-model'; expected a folder, a file, a Hugging Face id or one of"),
        (["llama-3-8b", "--hardware", "h300"], "hardware is 'h300'; expected one of"),
        (["llama-3-8b", "--weights", "bf15"], "weights is 'bf15'; expected one of"),
        (["llama-3-8b", "--cache", "none"], "cache is 'none'; expected one of"),
        (["llama-3-8b", "--context", "9000"], "context is 9000; the model was made for at most 8192"),
        (
            ["llama-3-8b", "--tensor-parallel-size", "3"],
            "--tensor-parallel-size is 3; it must divide num_heads 32 and divide",
        ),
        (
            ["mixtral-8x7b", "--tensor-parallel-size", "16"],
            "--tensor-parallel-size is 16; it must divide num_experts 8",
        ),
        (
            ["llama-3-8b", "--hardware", "t4"],
            "t4 has no bf16 matmul; it has fp16, int8, int4, fp32; "
            "pass --weights fp16 --cache fp16 --activations fp16",
        ),
        (["llama-3-8b", "--hardware", "t4", "--weights", "int4", "--cache", "int8"], "; pass --activations fp16"),
        (
            ["llama-3-8b", "--hardware", "t4", "--weights", "int8", "--cache", "int8", "--activations", "int8"],
            "t4 has no bf16 matmul; it has fp16, int8, int4, fp32; pass --activations fp16",
        ),
        (
            ["llama-3-8b", "--hardware", "tpu-v5e", "--weights", "fp32", "--cache", "fp32"],
            "tpu-v5e has no fp32 matmul; it has bf16, int8; pass --weights bf16 --cache bf16 --activations bf16",
        ),
        (
            ["llama-3-8b", "--pipeline-parallel-size", "3"],
            "--pipeline-parallel-size is 3; it must divide num_layers 32",
        ),
        (["llama-3-8b", "--tensor-parallel-size", "16"], "a replica has 16 devices; h200 joins 8 by its interconnect"),
        (
            ["llama-3-8b", "--data-parallel-size", "2"],
            "batch is 1; it must be at least 2, a sequence for each replica",
        ),
        (["llama-3-8b", "--microbatches", "2"], "microbatches is 2; it must be in 1..1, the sequences of a replica"),
        (["llama-3-8b", "--goal", "latency"], "--goal and --devices belong together; give both"),
        (["llama-3-8b", "--devices", "8"], "--goal and --devices belong together; give both"),
        (
            ["llama-3-8b", "--goal", "latency", "--devices", "8", "--data-parallel-size", "2", "--plot", "x.png"],
            "--goal proposes the mesh; leave out --data-parallel-size, --plot",
        ),
        (["llama-3-8b", "--goal", "cost", "--devices", "8"], "'cost' is not one of 'latency', 'throughput'"),
        (["llama-3-8b", "--goal", "latency", "--devices", "0"], "0 must be an integer, at least 1"),
        (["llama-3-8b", "--batch", "0"], "Invalid value for '--batch': 0 must be an integer, at least 1"),
        (["llama-3-8b", "--batch", "-5"], "Invalid value for '--batch': -5 must be an integer, at least 1"),
        (["llama-3-8b", "--attention", "xla"], "'xla' is not one of 'flash', 'materialized'"),
        (["llama-3-8b", "--batch", "x"], "Invalid value for '--batch': 'x' must be an integer, at least 1"),
        (["llama-3-8b", "--context", "0"], "Invalid value for '--context': 0 must be an integer, at least 1"),
        (
            ["llama-3-8b", "--tensor-parallel-size", "0"],
            "Invalid value for '--tensor-parallel-size' / '--tensor-parallel': 0 must be an integer, at least 1",
        ),
        (
            ["llama-3-8b", "--plot", "/nonexistent/x.png"],
            "Invalid value for '--plot': cannot write an image to /nonexistent/x.png: No such file or directory",
        ),
        (
            ["llama-3-8b", "--plot", "x.exe"],
            "Invalid value for '--plot': cannot write an image to x.exe: Format 'exe' is not supported",
        ),
    ],
)
def test_bad_input_is_an_error_of_usage(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    flat = " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())
    assert message in flat


def test_an_unknown_architecture_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    result = run(str(tmp_path))
    assert result.exit_code == 2
    assert "BertModel" in result.output


def test_the_plot_is_written(tmp_path):
    image = tmp_path / "roofline.png"
    result = run("llama-3-8b", "--plot", str(image))
    assert result.exit_code == 0, result.output
    assert image.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_plot_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("llama-3-8b", "--plot", str(tmp_path / "roofline.png"))
    assert result.exit_code == 2
    assert "jaxinfer[plots]" in result.output


def test_tables_show_every_part_and_the_interconnect_of_several_devices():
    made = make_plan(find_model("mixtral-8x7b"), find_hardware("h200"), 8, 1024, Precision("int4"), Mesh(tensor=2))
    console = Console(width=200, record=True, file=io.StringIO())
    for table in plan_tables(made):
        console.print(table)
    text = console.export_text()
    for part in (
        "embedding",
        "norms",
        "projections",
        "attention",
        "experts",
        "router",
        "head",
        "all-reduce",
        "look-up",
    ):
        assert part in text
    assert "interconnect" in text
    assert "all, what is sent meanwhile" in text


def test_every_axis_has_its_figures():
    axes = [word for axis in ("tensor", "pipeline", "context", "data") for word in (f"--{axis}-parallel-size", "2")]
    result = run("llama-3-8b", "--hardware", "h200-measured", "--batch", "32", *axes)
    assert result.exit_code == 0, result.output
    for line in (
        "16: pipe 2 x tensor 2 x context 2 x replicas 2",
        "Cache of 16 x 4,096 tokens in each of 2 replicas:",
        "Decode step: 8 x 1 token, context 4,096, a stage",
        "Of all 4,096 tokens, outside the pipe",
        "2 micro-batches of a decode step leave a bubble of 6% where it drains after 8 steps",
        "8 of a prompt one of 11%",
    ):
        assert line in result.output
    for collective in (
        "all-reduces of tensor parallelism",
        "ring of keys",
        "merge of parts",
        "to the next stage",
        "stage to all",
    ):
        assert collective in result.output


def figure_of_the_best(name: str, output: str) -> str:
    (figure,) = re.findall(rf"│ {name} +│ +([^│]*?) │", output)
    return figure


@pytest.mark.parametrize("goal", ["latency", "throughput"])
@pytest.mark.parametrize("devices", [8, 64])
def test_a_proposal_is_whole_in_80_columns(goal, devices):
    """No figure of the best is cut, or wrapped, and nothing else is either."""
    hardware = "h200-measured" if devices == 8 else "tpu-v4"
    asked = ("llama-3-8b", "--hardware", hardware, "--goal", goal, "--devices", str(devices))
    narrow, wide = (run(*asked, columns=columns).output for columns in ("80", "300"))
    rows, expected = ([line.split() for line in told.splitlines() if line[:1] == "│"][:8] for told in (narrow, wide))
    assert [row[1] for row in rows] == [
        "sequences", "weights", "cache", "ms", "tokens/s", "first", "bubble", "sent"
    ]  # fmt: skip
    assert rows == expected
    assert "…" not in narrow


def test_a_proposal_is_the_plan_that_its_options_make():
    result = run("llama-3-70b", "--hardware", "h200-measured", "--goal", "throughput", "--devices", "8")
    assert result.exit_code == 0, result.output
    (options,) = re.findall(r"the best for throughput is .*:\n(--.*)", result.output)
    rate, first = (figure_of_the_best(name, result.output) for name in ("tokens/s", "first token"))
    again = run("llama-3-70b", "--hardware", "h200-measured", *options.split())
    assert again.exit_code == 0, again.output
    assert f"decode is expected at {rate} tokens/s" in " ".join(again.output.split())
    assert f"the first token after {first}." in " ".join(again.output.split())
    assert "What does not fit" in result.output
    assert "141 GB of weights" in result.output


def test_a_proposal_without_a_mesh_that_fits_says_no_with_figures():
    result = run("llama-3-70b", "--hardware", "l4", "--goal", "latency", "--devices", "2")
    assert result.exit_code == 1
    flat = " ".join(result.output.split())
    assert "No mesh of 2 fits; nearest is tensor 2: 70.6 GB of weights; " in flat
    assert "of cache needed, none left, for weights and activations alone are" in flat

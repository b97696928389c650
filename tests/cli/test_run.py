"""The set-ups of configs/runs, and the command that runs one."""

import json
import re
import tomllib
from functools import partial
from pathlib import Path

import pytest

import jaxinfer.cli.run as command
from benchmarks.decode import NEW, PROMPT
from benchmarks.record import RESULTS, parts
from jaxinfer.cli.models import find_model
from jaxinfer.cli.run import RUNS, Run, find_run
from jaxinfer.roofline import Mesh, Plan, parameters
from tests.cli.test_cli import flat
from tests.cli.test_cli import run as invoke

FILES = sorted(RUNS.glob("*.toml"))
files = pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)


run = partial(invoke, "run")


def written(tmp_path, **changes) -> str:
    """A file like one of configs/runs; a field that is None is left out."""
    content = tomllib.loads(find_run("llama-3-8b-1-h200").read_text()) | {"measured": None} | changes
    path = tmp_path / "set-up.toml"
    lines = (f"{name} = {json.dumps(value)}" for name, value in content.items() if value is not None)
    path.write_text("\n".join(lines))
    return str(path)


def test_there_are_set_ups():
    assert FILES


@files
def test_a_file_says_what_its_command_makes(file):
    setup = Run.read(file)
    plan = setup.plan()
    assert plan.memory.fits
    assert plan.mesh.devices == setup.devices
    predicted = {
        "tokens_per_second": round(plan.expected),
        "first_token": round(plan.prefill.predict(plan.hardware) * 1e3, 1),
    }
    assert {name: getattr(setup, name) for name in predicted} == predicted | measured(setup)


def records(results: str) -> list[tuple[str, dict]]:
    """Of files of benchmarks/results, each with its device."""
    content = [part for path in RESULTS.glob(results) for part in parts(json.loads(path.read_text()))]
    return [(part["environment"]["device"], record) for part in content for record in part["records"]]


def figure_of(setup: Run, plan: Plan, record: dict) -> str | None:
    """Which figure of a set-up, on one device or by tensor parallelism, a record is on such devices."""
    model, _, case = record["case"].partition(" ")
    case, _, mesh = case.partition(" on ")
    if plan.mesh != Mesh(tensor=setup.devices) or mesh != (f"tensor {setup.devices}" if setup.devices > 1 else ""):
        return None
    sought = {
        "tokens_per_second": ("decode", f"B{plan.batch}", PROMPT + NEW // 2),
        "first_token": ("first token", f"prompt {setup.context}", setup.context),
    }
    for name, what in sought.items():
        if (record["metric"], case.partition(" in chunks")[0], setup.context) == what:
            return name if parameters(find_model(model)) == parameters(find_model(setup.model)) else None
    return None


def measured(setup: Run) -> dict[str, float]:
    found, plan = {}, setup.plan()
    for name, where in setup.measured.items():
        sought = {field: where[field] for field in ("case", "implementation", "metric")}
        ((device, record),) = [one for one in records(where["results"]) if sought.items() <= one[1].items()]
        assert (device, figure_of(setup, plan, record)) == (setup.machine().device_kind, name)
        found[name] = round(record["value"], 1)
    return found


@files
def test_what_was_measured_is_not_predicted(file):
    setup = Run.read(file)
    plan = setup.plan()
    ours = [record for device, record in records("*/decode.json") if device == setup.machine().device_kind]
    assert {figure_of(setup, plan, record) for record in ours if record["implementation"] != "plan"} <= {
        None, *setup.measured
    }  # fmt: skip


def test_replicas_have_devices_and_sequences_of_their_own(tmp_path):
    text = "jaxinfer serve --data-parallel-size 4 --tensor-parallel-size 2 --max-num-seqs 8"
    plan = Run.read(Path(written(tmp_path, command=text))).plan()
    assert (plan.mesh.devices, plan.batch, plan.memory.batch) == (8, 32, 8)


def test_several_hosts_have_their_devices_each_and_a_network_between_them(tmp_path):
    two = {"devices": 4, "command": "jaxinfer serve --coordinator auto --tensor-parallel-size 4"}
    setup = Run.read(Path(written(tmp_path, hosts=2, network=1e9, **two)))
    setup.check_devices(["NVIDIA H200"] * 2)
    with pytest.raises(ValueError, match=r"needs 2 x NVIDIA H200; here are 1 x NVIDIA H200"):
        setup.check_devices(["NVIDIA H200"])
    faster = Run.read(Path(written(tmp_path, hosts=2, network=1e11, **two)))
    assert setup.plan().expected < faster.plan().expected


def test_what_is_measured_is_told_from_what_is_predicted():
    (_, _, line) = Run.read(find_run("long-context-1-h100")).lines()
    assert re.search(r"with 131,072 tokens in each sequence: \d+ tokens/s of decoding \(predicted\)", line)
    assert line.endswith("after 10,476.5 ms (measured)")


def test_the_command_runs_where_the_devices_are(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "devices_here", lambda: ["NVIDIA H200", "NVIDIA H200"])
    answers, requests = tmp_path / "answers.jsonl", tmp_path / "requests.jsonl"
    body = {"prompt": "def f(", "max_tokens": 2, "temperature": 0}
    line = {"custom_id": "one", "method": "POST", "url": "/v1/completions", "body": body}
    requests.write_text(json.dumps(line) + "\n")
    text = f"jaxinfer batch {requests} {answers} --max-model-len 16 --max-num-seqs 1"
    result = run(written(tmp_path, command=text, title="A title", tokens_per_second=1234.4, first_token=5))
    assert result.exit_code == 0, result.output
    assert json.loads(answers.read_text())["response"]["status_code"] == 200
    assert f"A title\n$ {text}\nexpected with 256 tokens in each sequence: 1,234 tokens/s of d" in result.output
    assert "first token of such a prompt after 5.0 ms (predicted)" in result.output


@pytest.mark.parametrize(
    ("here", "found"),
    [
        (["NVIDIA H200"], "here are 1 x NVIDIA H200"),
        (["NVIDIA H100 80GB HBM3"] * 8, "here are 8 x NVIDIA H100 80GB HBM3"),
        ([], "here are no devices"),
    ],
)
def test_other_hardware_is_refused(here, found, monkeypatch):
    monkeypatch.setattr(command, "devices_here", lambda: here)
    result = run("llama-3-8b-2-h200")
    assert result.exit_code == 2
    assert f"Llama-3-8B on two H200, tensor parallel: needs 2 x NVIDIA H200; {found}" in flat(result.output)


def test_devices_are_those_of_a_process_of_its_own(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    assert command.devices_here() == ["cpu"] * 3
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    with pytest.raises(ValueError, match=r"JAX finds no devices here: .*abacus"):
        command.devices_here()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None, "title": None}, "set-up.toml misses model, title; expected title, command, model"),
        ({"color": "red"}, "set-up.toml has unknown color; expected title, command"),
        ({"devices": "two"}, "set-up.toml: devices is 'two'; expected int"),
        ({"command": "rm -r x"}, "command is 'rm -r x'; expected one of jaxinfer batch, jaxinfer generate, "),
        ({"command": "jaxinfer run x"}, "command is 'jaxinfer run x'; expected one of jaxinfer batch"),
        ({"command": ""}, "command is ''; expected one of jaxinfer batch"),
        ({"command": "jaxinfer serve --pipes 2"}, "command is 'jaxinfer serve --pipes 2': No such option: --pipes"),
        ({"command": "jaxinfer serve --port x"}, "Invalid value for '--port': 'x' must be an integer in 0..65535"),
        ({"measured.speed": 1}, "set-up.toml: measured has speed; expected tokens_per_second or first_token"),
        ({"hosts": 2}, "hosts = 2, devices = 1 and network = 0.0; expected hosts that divide the devices, and a net"),
        ({"hosts": 2, "devices": 2}, "hosts = 2, devices = 2 and network = 0.0; expected"),
        ({"network": 1e9}, "hosts = 1, devices = 1 and network = 1000000000.0; expected"),
        ({"model": "mine"}, "model is 'mine'; expected a folder, a file, a Hugging Face id or one of"),
        ({"context": 9000}, "context is 9000; the model was made for at most 8192"),
        ({"hardware": "h300"}, "hardware is 'h300'; expected one of"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused(tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr(command, "devices_here", lambda: ["NVIDIA H200"])
    result = run(written(tmp_path, **changes))
    assert result.exit_code == 2
    assert message in flat(result.output)


def test_what_is_no_file_is_refused_with_the_names(tmp_path):
    with pytest.raises(ValueError, match=r"file is 'mine'; expected a file, or one of llama-3-70b-2-h200, "):
        find_run("mine")
    (tmp_path / "set-up.toml").write_text("title = ")
    result = run(str(tmp_path / "set-up.toml"))
    assert result.exit_code == 2
    assert "is not valid TOML" in flat(result.output)

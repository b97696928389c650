"""The commands as a user types them."""

import inspect
import json
import math
import os
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxinfer import checkpoint
from jaxinfer.cli import app
from jaxinfer.cli.online import MOST_TEXTS
from jaxinfer.cli.online import OPTIONS as ONLINE
from jaxinfer.decode.speculative import PromptLookup, by_name
from jaxinfer.engine import Options
from jaxinfer.llm import DEMO
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.roofline import find_hardware
from jaxinfer.training.online import OnlineDraft

ROOT = Path(__file__).parents[2]
SPEED = re.compile(
    r"\d+ tokens, ([\d.]+) tokens/s, ([\d.]+) ([kMG])B/s, ([\d.]+)% of this machine's limit \((\d+) tokens/s"
)
PREFIXES = {"k": 1e3, "M": 1e6, "G": 1e9}


def run(*arguments: str):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})


def flat(text: str) -> str:
    """Text without the frames and line breaks of a terminal."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def test_generate_streams_code_and_states_its_speed():
    """In a process of its own, as the README starts it, with a shorter answer."""
    main = "from jaxinfer.cli import app; app()"
    command = [sys.executable, "-c", main, "generate", "def fibonacci(n):", "--max-tokens", "40"]
    with subprocess.Popen(
        [*command, "--max-model-len", "64"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        pieces = list(iter(lambda: os.read(process.stdout.fileno(), 65536), b""))
        said = flat(process.stderr.read().decode())
    assert process.returncode == 0, said
    text = b"".join(pieces).decode()
    assert text.startswith("def fibonacci(n):")
    assert len(text.strip()) > len("def fibonacci(n):")
    assert len(pieces) > 1  # the text came before the end

    for op in ("flash_attention", "flash_decoding"):  # which implementation runs, once, beside the text
        assert len(re.findall(f"{op} runs as ", said)) == 1
        assert op not in text

    rate, number, prefix, percent, limit = SPEED.search(said).groups()
    assert float(percent) / 100 == pytest.approx(float(rate) / float(limit), rel=0.02, abs=1e-3)
    per_token = float(number) * PREFIXES[prefix] / float(rate)
    weights = sum(path.stat().st_size for path in DEMO.glob("*.safetensors"))
    assert weights < per_token < 1.1 * weights  # a step reads every weight once, and the cache


def test_generate_says_what_proposals_bring():
    """Those of the draft that ships with the demo model."""
    options = ["--max-tokens", "40", "--max-model-len", "64", "--temperature", "0", "--num-speculative-tokens", "2"]
    said = run("generate", "import os\n\ndef ", *options, "--speculate", "draft", "--always-speculate")
    assert said.exit_code == 0, said.output
    figures = r"([\d.]+) tokens a step, [\d.]+ times plain decoding \((.*)\); right by place: (\d+)% (\d+)%"
    tokens, prediction, first, both = re.search(figures, flat(said.output)).groups()
    assert prediction == "not predicted, as the hardware table has no measured entry of this machine"
    tokens, first, both = map(float, (tokens, first, both))
    assert tokens == pytest.approx(1 + (first + both) / 100, abs=0.02)
    assert 1 < tokens <= 3
    assert first >= both


@pytest.mark.parametrize("command", ["generate", "batch"])
def test_the_dtype_of_the_cache_and_the_method_reach_the_engine(command, tmp_path, monkeypatch):
    def refuse(model, *, options, **arguments):
        how = options.always_speculate, options.adaptive_speculation
        raise ValueError(f"a cache of {options.cache_dtype}, {how} and {options.speculation}")

    monkeypatch.setattr("jaxinfer.llm.LLM", refuse)
    (tmp_path / "in").touch()
    files = [str(tmp_path / name) for name in ("in", "out")]
    asked = ["--cache-dtype", "int8", "--speculate", "lookup", "--num-speculative-tokens", "5", "--always-speculate",
             "--adaptive-speculation"]  # fmt: skip
    result = run(command, *(["a"] if command == "generate" else files), *asked)
    assert "a cache of int8, (True, True) and PromptLookup(num_speculative_tokens=5" in flat(result.output)


def test_a_server_bounds_how_long_a_prompt_holds_up_the_others(monkeypatch):
    asked = []

    def served(setups, *others):
        (setup,) = setups
        asked.append(Options(**setup.options, speculation=by_name(**setup.speculation)))
        return 0

    monkeypatch.setattr("jaxinfer.serve.server.run", served)
    asks = ["--speculate", "lookup", "--num-speculative-tokens", "5", "--always-speculate", "--adaptive-speculation"]
    assert run("serve", "--port", "0", *asks).exit_code == 0
    (options,) = asked
    assert (options.max_slowdown, Options().max_slowdown) == (1.75, math.inf)
    assert options.speculation == PromptLookup(5)
    assert options.always_speculate
    assert options.adaptive_speculation


def test_what_learns_is_made_in_the_engine_process(monkeypatch):
    """It is pickled on its way there, with what was asked for; the rest is as the help says."""
    asked, defaults = [], inspect.signature(OnlineDraft).parameters
    monkeypatch.setattr("jaxinfer.serve.server.run", lambda setups, *others: asked.extend(setups) or 0)
    monkeypatch.setattr(
        "jaxinfer.training.online.OnlineDraft", lambda *given, **named: SimpleNamespace(see=(given, named))
    )
    flags = ["serve", "--port", "0", "--speculate", "draft"]
    for more in (
        [],
        ["--online-draft"],
        ["--online-draft", "--online-learning-rate", "0.1", "--online-interval", "3"],
    ):
        assert run(*flags, *more).exit_code == 0
    plain, default, chosen = (pickle.loads(pickle.dumps(setup)).watch for setup in asked)
    assert plain is None
    assert default("the engine") == (("the engine",), {})
    assert chosen("the engine") == (("the engine",), {"learning_rate": 0.1, "interval": 3})
    for name in ("learning_rate", "interval", "batch"):
        (option,) = ONLINE[f"online_{name}"][0].__metadata__
        assert f"; {defaults[name].default} by default" in option.help
    assert defaults["buffer"].default == MOST_TEXTS


def test_convert_keeps_every_bit(tmp_path):
    assert run("convert", str(DEMO), str(tmp_path / "own")).exit_code == 0
    model = Model(read_config(DEMO), make_mesh(2))
    published, own = (checkpoint.load(folder, model) for folder in (DEMO, tmp_path / "own"))
    assert published.keys() == own.keys() == model.parameters.keys()
    for name, array in own.items():
        assert array.sharding == model.parameters[name].sharding
        assert array.dtype == published[name].dtype
        np.testing.assert_array_equal(np.asarray(array), np.asarray(published[name]), err_msg=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "--model", "no-such-model"], "no-such-model"),
        (["generate", "a", "--model", str(ROOT / "tests")], "config.json"),
        (["generate", "", "--max-model-len", "32"], "the prompt is empty"),
        (["generate", "a", "--max-tokens", "0"], "max_tokens = 0 must be"),
        (["generate", "a", "--max-model-len", "32", "--max-tokens", "32"], "max_tokens = 32 must be in 1..30"),
        (["generate", "a", "--temperature", "nan"], "temperature = nan must be"),
        (["generate", "a", "--dtype", "int8"], "dtype = 'int8' must be bfloat16, float16 or float32"),
        (["generate", "a", "--cache-dtype", "fp8"], "cache_dtype = 'fp8' must be one of float32,"),
        (["generate", "a", "--speculate", "magic"], "speculate = 'magic' must be one of draft, eagle, early-exit"),
        (["generate", "a", "--num-speculative-tokens", "4"], "num_speculative_tokens = 4 has no use without a method"),
        (["generate", "a", "--draft-model", "b"], "draft_model = 'b' has no use without a method"),
        (
            ["generate", "a", "--adaptive-speculation"],
            "adaptive_speculation = True has no use where speculation = None",
        ),
        (
            ["generate", "a", "--speculate", "lookup", "--draft-model", "b"],
            "draft_model = 'b' has no use where speculate = 'lookup'",
        ),
        (
            ["generate", "a", "--speculate", "lookup", "--num-speculative-tokens", "0"],
            "num_speculative_tokens = 0 must be an integer in 1..127",
        ),
        (
            ["generate", "a", "--speculate", "lookahead", "--num-speculative-tokens", "8"],
            "num_speculative_tokens = 8 must be one less than a multiple of 4 in 8..128",
        ),
        (["serve", "--online-draft"], "online_draft has no use where speculate = None; it must be 'draft'"),
        (
            ["serve", "--speculate", "lookup", "--online-draft"],
            "online_draft has no use where speculate = 'lookup'; it must be 'draft'",
        ),
        (
            ["serve", "--speculate", "draft", "--online-batch", "4"],
            "online_batch = 4 has no use without --online-draft",
        ),
        (["serve", "--online-learning-rate", "0.1"], "online_learning_rate = 0.1 has no use without --online-draft"),
        (["serve", "--online-learning-rate", "0"], "'--online-learning-rate': 0 must be a number in 1e-09..1"),
        (["serve", "--online-interval", "0"], "'--online-interval': 0 must be an integer, at least 1"),
        (["serve", "--online-batch", "257"], "'--online-batch': 257 must be an integer in 1..256"),
        (["generate", "a", "--temperature", "x"], "Invalid value for '--temperature': 'x' must be a number"),
        (["generate", "a", "--max-tokens", "1.5"], "Invalid value for '--max-tokens': '1.5' must be an integer"),
        (["generate", "a", "--tensor-parallel-size", "4"], "tensor"),
        (
            ["generate", "a", "--tensor-parallel-size", "0"],
            "'--tensor-parallel-size': 0 must be an integer, at least 1",
        ),
        (
            ["generate", "a", "--tensor-parallel-size", "9"],
            "--tensor-parallel-size = 9 must be an integer in 1..8, the devices",
        ),
        (
            ["generate", "a", "--pipeline-parallel-size", "9"],
            "--pipeline-parallel-size = 9 must be an integer in 1..8",
        ),
        (["generate", "a", "--pipeline-parallel-size", "5"], "pipe has 5 stages, which does not divide num_layers"),
        (
            ["generate", "a", "--pipeline-parallel-size", "2", "--context-parallel-size", "2"],
            "--context-parallel-size = 2 does not go with --pipeline-parallel-size = 2",
        ),
        (["convert", "no-such-model", "own"], "no-such-model"),
        (["convert", str(DEMO), str(DEMO)], "demo"),
        (["plan", "no-such-model"], "no-such-model"),
        (["train", "demo", str(DEMO)], "demo is not empty; it must be absent or an empty folder"),
        (["train", "demo", "--steps", "0"], "Invalid value for '--steps': 0 must be an integer, at least 1"),
        (["train", "distill", str(DEMO)], "demo is not empty; it must be absent or an empty folder"),
        (["train", "medusa", str(DEMO)], "demo is not empty; it must be absent or an empty folder"),
        (["train", "medusa", "new", "--heads", "0"], "Invalid value for '--heads': 0 must be an integer, at least 1"),
        (["train", "eagle", str(DEMO)], "demo is not empty; it must be absent or an empty folder"),
        (["train", "eagle", "new", "--passes", "0"], "Invalid value for '--passes': 0 must be an integer, at least 1"),
        (["train", "distill", "new", "--kind", "kl"], "kind = 'kl' must be one of cross-entropy, forward-kl"),
        (["train", "distill", "new", "--batch", "0"], "Invalid value for '--batch': 0 must be an integer, at least 1"),
        (["fly"], "No such command 'fly'"),
    ],
)
def test_bad_input_is_one_sentence_and_an_error_of_usage(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in flat(result.output)
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "wrong", [["--max-tokens", "0"], ["--temperature", "nan"], ["--top-p", "2"], ["--seed", "-1"]], ids="".join
)
def test_nothing_is_loaded_for_parameters_out_of_range(wrong, monkeypatch):
    loaded = []
    monkeypatch.setattr("jaxinfer.llm.LLM", lambda *_, **__: loaded.append(wrong))
    assert run("generate", "a", *wrong).exit_code == 2
    assert not loaded


def test_training_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("train", "demo", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "pip install 'jaxinfer[plots]'" in flat(result.output)
    assert not (tmp_path / "out").exists()


def test_an_unknown_architecture_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    result = run("generate", "a", "--model", str(tmp_path))
    assert result.exit_code == 2
    assert "architectures is ['BertModel'], which is unknown" in flat(result.output)


def test_doctor_prints_all_its_tables(monkeypatch):
    monkeypatch.setattr("jaxinfer.machine.measure_machine", lambda: find_hardware("h200-measured"))  # takes a second
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for title in ("Versions", f"Devices: {jax.default_backend()}", "Kernels", "Speed"):
        assert title in result.output


def test_help_lists_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    for command in ("generate", "plan", "doctor", "convert", "train"):
        assert re.search(rf"\b{command}\b", result.output), command


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"]])
def test_help_is_there_before_jax(arguments):
    """In a process of its own: a command imports what it needs when it runs."""
    program = """
        import sys
        from jaxinfer.cli import app
        try:
            app(sys.argv[1:])
        finally:
            assert not {"jax", "numpy", "huggingface_hub"} & set(sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout

"""The options of speculation: each reaches its method, by all commands, and does what it says."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxinfer import SamplingParams
from jaxinfer.cli.generate import gain, predicted
from jaxinfer.cli.speculation import CHANGES, OPTIONS
from jaxinfer.decode.layout import Layout
from jaxinfer.decode.speculative import (
    METHODS,
    DraftModel,
    Eagle,
    EarlyExit,
    Lookahead,
    Medusa,
    PromptLookup,
    Typical,
    by_name,
)
from jaxinfer.engine import Counters, Options
from jaxinfer.engine.costs import predicted_costs
from jaxinfer.llm import LLM
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.roofline import MEASURED
from tests.cli.test_cli import ROOT, flat, run
from tests.engine.eagle_heads import nearly_right, write_head
from tests.engine.test_medusa import D, V, write
from tests.engine.tiny import CONFIG, tiny_folder
from tests.engine.tiny import OPTIONS as SIZES

ASKED = [
    ("lookup --num-speculative-tokens 5 --prompt-lookup-max 2", PromptLookup(5, 2)),
    ("draft --draft-model small --coupled", DraftModel("small", coupled=True)),
    ("early-exit --exit-layers 2 --num-speculative-tokens 2", EarlyExit(2, 2)),
    (
        "lookahead --window-size 3 --ngram-size 4 --max-verification-set-size 2 --pool-size 9",
        Lookahead(3, 4, 2, 9),
    ),
    ("lookahead --num-speculative-tokens 14 --ngram-size 4 --pool-size 9", Lookahead(3, 4, 2, 9)),
    ("eagle --num-speculative-tokens 4 --depth 3 --branches 2 --static", Eagle(None, 4, 3, 2, dynamic=False)),
    ("eagle --dynamic", Eagle()),
    ("medusa --draft-model heads --typical", Medusa("heads", typical=Typical())),
    ("medusa --typical --typical-epsilon 0.2 --typical-delta 0.5", Medusa(typical=Typical(0.2, 0.5))),
]


def test_all_that_a_method_can_be_told_has_an_option():
    settings = {name for method in METHODS.values() for name in method.settings()}
    assert set(OPTIONS) == settings | {"speculate", "always_speculate", "adaptive_speculation"}


def test_the_readme_lists_the_options_of_each_method():
    listed = dict(re.findall(r"^\| ([\w-]+) \| (`--.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert listed.keys() == METHODS.keys()
    for name, options in listed.items():
        shown = {option.replace("-", "_") for option in re.findall(r"`--([\w-]+)`", options)}
        told = set(METHODS[name].settings()) - {"num_speculative_tokens"}
        assert shown == {"static" if setting == "dynamic" else setting for setting in told}


@pytest.mark.parametrize("command", ["generate", "batch", "serve"])
@pytest.mark.parametrize(("asked", "method"), ASKED, ids=[asked for asked, _ in ASKED])
def test_an_option_reaches_its_method(command, asked, method, tmp_path, monkeypatch):
    reached = []

    def load(model, *, options, **arguments):
        reached.append(options)
        raise ValueError("enough")

    def served(setups, *others):
        (setup,) = setups
        reached.append(Options(**setup.options, speculation=by_name(**setup.speculation)))
        return 0

    monkeypatch.setattr("jaxinfer.llm.LLM", load)
    monkeypatch.setattr("jaxinfer.serve.server.run", served)
    (tmp_path / "in").touch()
    own = {"generate": ["a"], "batch": [str(tmp_path / "in"), str(tmp_path / "out")], "serve": ["--port", "0"]}
    result = run(command, *own[command], "--speculate", *asked.split(), "--always-speculate")
    (options,) = reached
    assert (options.speculation, options.always_speculate) == (method, True)
    assert (CHANGES in flat(result.output)) == (command == "serve" and "--typical" in asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("--static", "dynamic = False has no use without a method"),
        ("--speculate lookup --depth 3", "depth = 3 has no use where speculate = 'lookup', but with eagle"),
        (
            "--speculate lookup --coupled",
            "coupled = True has no use where speculate = 'lookup', but with draft or early",
        ),
        ("--speculate eagle --typical", "typical = True has no use where speculate = 'eagle', but with medusa"),
        ("--speculate eagle --depth 0", "depth = 0 must be an integer in 1..127"),
        ("--speculate eagle --branches x", "Invalid value for '--branches': 'x' must be an integer"),
        ("--speculate early-exit --exit-layers 0", "exit_layers = 0 must be an integer, at least 1"),
        ("--speculate lookahead --window-size 0", "window_size = 0 must be an integer, at least 1"),
        (
            "--speculate lookahead --window-size 99",
            "window_size = 99 and max_verification_set_size = 7 with ngram_size",
        ),
        (
            "--speculate lookahead --num-speculative-tokens 11 --window-size 3",
            "window_size = 3 has no use beside num_speculative_tokens, which implies it",
        ),
        (
            "--speculate lookahead --num-speculative-tokens 11 --ngram-size 1",
            "ngram_size = 1 must be an integer, at least 2",
        ),
        ("--speculate medusa --typical-delta 0.5", "typical_delta = 0.5 has no use without typical"),
        (
            "--speculate medusa --typical --typical-epsilon 0",
            "typical.epsilon = 0.0 must be a number above 0, at most 1",
        ),
    ],
)
def test_what_has_no_use_or_is_out_of_range_is_refused_before_anything_is_loaded(asked, message, monkeypatch):
    loaded = []
    monkeypatch.setattr("jaxinfer.llm.LLM", lambda *_, **__: loaded.append(asked))
    result = run("generate", "a", *asked.split())
    assert (result.exit_code, loaded) == (2, [])
    assert message in flat(result.output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of two layers whose next token follows from the one before, with heads of both kinds that say so."""
    folder = write(tmp_path_factory.mktemp("told") / "model", tiny_folder(tmp_path_factory.getbasetemp()), 1.0)
    write_head(folder / "eagle", nearly_right(D, rest=0.1), V)
    return folder


def proposed(folder: Path, monkeypatch, asked: str, params: SamplingParams) -> Counters:
    """What an engine counts whose method is what `serve` was asked for."""
    setups = []
    monkeypatch.setattr("jaxinfer.serve.server.run", lambda asked, *others: setups.extend(asked) or 0)
    assert run("serve", "--port", "0", "--speculate", *asked.split()).exit_code == 0
    method = by_name(**setups[0].speculation)
    llm = LLM(folder, options=replace(SIZES, max_num_seqs=1, speculation=method, always_speculate=True))
    llm.generate(["abab"], params)
    return llm.engine.counters


@pytest.mark.parametrize(
    ("asked", "places"),
    [
        ("early-exit --exit-layers 1 --num-speculative-tokens 2", 2),
        ("lookahead --window-size 4 --ngram-size 3 --max-verification-set-size 1", 4),
        ("eagle --draft-model {folder}/eagle --depth 2 --branches 2 --num-speculative-tokens 4", 2),
    ],
)
def test_proposals_are_of_the_size_that_was_asked_for(asked, places, folder, monkeypatch):
    greedy = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    counters = proposed(folder, monkeypatch, asked.format(folder=folder), greedy)
    assert len(counters.accepted) == places
    assert counters.drafts > 0


def test_layers_that_draft_are_fewer_than_the_models(folder):
    result = run("generate", "a", "--model", str(folder), "--speculate", "early-exit", "--exit-layers", "2")
    assert result.exit_code == 2
    assert "exit_layers = 2 must be fewer than the model's 2 layers" in flat(result.output)


def test_typical_acceptance_takes_all_that_is_likely_enough(folder, monkeypatch):
    """All there is, where a probability of next to nothing is enough: three tokens and one more in each step."""
    asked, params = f"medusa --draft-model {folder}", SamplingParams(max_tokens=41, seed=0, ignore_eos=True)
    exact = proposed(folder, monkeypatch, asked, params)
    likely = proposed(folder, monkeypatch, f"{asked} --typical --typical-epsilon 1e-9", params)
    assert (likely.drafts, *likely.accepted) == (10, 10, 10, 10)
    assert exact.drafts > likely.drafts


def test_generate_predicts_the_gain_where_ceilings_were_measured(monkeypatch):
    """As the cost model does, of what was right; in words elsewhere, and where nothing was proposed."""
    model = Model(read_config(CONFIG), make_mesh(1))
    layout = Layout(1, 8, (9, 9), 64, "float32", speculation=PromptLookup(2))
    llm: Any = SimpleNamespace(model=model, engine=SimpleNamespace(layout=layout))
    brought = Counters(output_tokens=1 + 40 + 12, drafts=20, accepted=(15, 5), proposed=(0, 20))
    monkeypatch.setattr("jaxinfer.machine.measured_entry", lambda dtype: MEASURED["h200-measured"])
    costs = predicted_costs(model, layout, MEASURED["h200-measured"])
    plain, proposing = costs.predicted([32], 0), costs.predicted([32], 2)
    times = 52 * plain / (12 * plain + 20 * proposing)
    by_prediction = predicted(llm, 32, brought)
    cost = f"where a step takes as long as {proposing / plain:.2f} plain ones"
    assert by_prediction == f"{times:.2f} by prediction for h200-measured, {cost}"
    assert f"2.00 tokens a step, 1.50 times plain decoding ({by_prediction}); " in gain(brought, 1.5, by_prediction)
    monkeypatch.undo()
    assert predicted(llm, 32, brought).startswith("not predicted, as the hardware table has no measured entry")
    assert gain(Counters(output_tokens=9), 0.98, "") == "nothing was proposed, 0.98 times plain decoding"


def test_generate_says_that_typical_acceptance_changes_the_distribution(folder):
    asked = f"--model {folder} --max-tokens 1 --temperature 0 --speculate medusa --draft-model {folder}"
    result = run("generate", "abab", *asked.split(), "--typical")
    assert result.exit_code == 0, result.output
    assert f"typical acceptance: {CHANGES}" in flat(result.output)

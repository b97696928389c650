"""The benchmark of speculation, on small models."""

import itertools
import json
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from benchmarks.bench import Bench
from benchmarks.record import Record
from benchmarks.speculative import __main__ as command
from benchmarks.speculative import acceptance, comparing, verification
from benchmarks.speculative.methods import CHAINS, HEADS, named, random_weights, shaped
from benchmarks.speculative.plot import gains, plot_gains
from benchmarks.speculative.verification import missed, verifying
from benchmarks.tables import METHODS, TABLES, TEMPERATURES
from jaxinfer.decode import speculative
from jaxinfer.decode.speculative import EarlyExit, Medusa, PromptLookup, tree_of
from jaxinfer.engine import Engine
from jaxinfer.llm import DRAFT, LLM
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from tests.benchmarks.test_decode import subject
from tests.engine.test_medusa import blocks, save_heads
from tests.engine.tiny import CONFIG, ONE_LAYER, one_rectangle, tiny_folder
from tests.model.random_params import random_params

SIZES = {"lookup": 3, "draft": 3, "early-exit": 3, "medusa": 3, "eagle": 3, "lookahead": 7}


# --- what a step costs


def test_the_costs_of_verifying_stand_beside_the_plan(monkeypatch, tmp_path):
    """Of every method, with random weights where it has some."""
    (tmp_path / "config.json").write_text(json.dumps(ONE_LAYER))
    monkeypatch.setattr(verification, "PROMPT", 5)
    tiny = subject("auto", config=CONFIG)
    methods = {name: shaped(name, [SIZES[name]], str(tmp_path), tiny.model)[0] for name in METHODS}
    for name, method in methods.items():
        assert (tree_of(method) is None) == (name in CHAINS)
    records = verifying(tiny, 2, list(methods.values()), new=4, rounds=1)
    value = {(record.case, record.implementation, record.metric): record.value for record in records}
    ways = ("xla", "plan with XLA attention")
    cases = {name: f"tiny B2 {SIZES[name]} drafts" + (f" by {name}" if name != "lookup" else "") for name in METHODS}
    assert value.keys() == {
        *(("tiny B2 plain", way, "step") for way in ways),
        *((case, way, metric) for case in cases.values() for way in ways for metric in ("step", verification.OVER)),
    }
    for case, way in itertools.product(cases.values(), ways):
        ratio = value[case, way, "step"] / value["tiny B2 plain", way, "step"]
        assert value[case, way, verification.OVER] == pytest.approx(ratio)


def test_proposals_that_would_all_be_right_are_never_right():
    """A draft that is the whole model, and the same put off by one."""
    tiny, whole, lengths = subject("auto"), EarlyExit(3, exit_layers=1), []
    for method in (whole, missed(whole, CONFIG["vocab_size"])):
        bench = Bench(tiny, 2, 40, method)
        bench.prefill(5, 5)
        bench.decode(4)
        lengths.append(bench.state.length_B.tolist())
    assert lengths == [[5 + 4 * 4] * 2, [5 + 4] * 2]


def test_what_is_predicted_counts_all_that_a_proposal_runs():
    """A head's product with the output matrix is as much as one more row of logits."""
    tiny = subject("mosaic_gpu")
    method = named("medusa", 5).loaded(random_weights(tiny.model))
    bench = SimpleNamespace(layout=Bench(tiny, 2, 40, method).layout)
    without = SimpleNamespace(layout=Bench(tiny, 2, 40, named("lookup", 5)).layout)
    assert len(method.weights) == 2 * HEADS
    assert method.outputs == tree_of(method).depth > 1
    assert verification.predicted(tiny, bench, 4) > verification.predicted(tiny, without, 4)


def test_the_tables_of_costs_have_the_cases_that_are_measured():
    columns, by_method = TABLES["verification"].columns, TABLES["verification-by-method"]
    options = command.parse(["verification"])
    cases = {f"{options.model} B{batch} {count} drafts" for batch in options.batches for count in options.drafts}
    assert set(columns) == cases
    assert set(by_method.columns) == {f"{options.model} B{batch}" for batch in options.batches}
    found = set()
    for name in (name for name in METHODS if name != "lookup"):
        counts = command.parse(["verification", "--method", name]).drafts
        found |= {f" {named(name, count).num_speculative_tokens} drafts by {name}" for count in counts}
    assert set(by_method.variants) == found
    assert TABLES["verification"].metric == by_method.metric == verification.OVER


# --- what is right


@pytest.mark.parametrize("name", ["lookup", "medusa"])
def test_acceptance_accounts_for_every_token(monkeypatch, tmp_path_factory, tmp_path, name):
    """Of a chain and of a tree: all tokens but the first of each output, which the prompt brings."""
    method = PromptLookup(3) if name == "lookup" else Medusa(save_heads(tmp_path / "heads", blocks()), 3)
    folder = tiny_folder(tmp_path_factory.getbasetemp())
    monkeypatch.setattr(acceptance, "LLM", partial(LLM, folder))
    monkeypatch.setattr(acceptance, "warm_loops", lambda engine, kinds: None)
    monkeypatch.setattr(acceptance, "beginnings", lambda *sizes: iter([range(9), range(7), range(8)]))
    with one_rectangle():
        records = acceptance.accepting("it", method, [0.0, 0.7], new=12, texts=2)
    value = {(record.case, record.metric): record.value for record in records}
    for case in ("demo drafted by it T=0", "demo drafted by it T=0.7"):
        assert value[case, acceptance.BROUGHT] * value[case, "steps with proposals"] == pytest.approx(2 * 11)
    rights = {case for case, metric in value if metric == acceptance.RIGHT}
    assert len(rights) == (2 if name == "lookup" else 0)


def test_acceptance_is_of_all_methods_and_of_drafts_by_their_folders(monkeypatch, tmp_path):
    asked = []

    def accepting(name, method, temperatures, new, texts):
        asked.append((name, type(method), method.num_speculative_tokens))
        return [Record(f"demo drafted by {name} T=0", "jaxinfer", acceptance.BROUGHT, 1.5, "tokens")]

    monkeypatch.setattr(command, "accepting", accepting)
    command.main(["--output", str(tmp_path), "acceptance"])
    kinds = {name: kind for name, kind, _ in asked}
    assert kinds == speculative.METHODS | {DRAFT.name: speculative.METHODS["draft"]}
    asked.clear()
    two = ["--draft-models", "some/where", "else", "--drafts", "2"]
    command.main(["--output", str(tmp_path), "acceptance", "--methods", "draft", *two])
    assert asked == [("where", speculative.DraftModel, 2), ("else", speculative.DraftModel, 2)]


def test_the_tables_of_acceptance_have_the_cases_that_are_measured():
    options = command.parse(["acceptance"])
    accepted = TABLES["acceptance"]
    assert set(METHODS) == set(options.methods) == speculative.METHODS.keys()
    assert set(accepted.columns) == {f"demo drafted by {name}" for name in options.methods}
    assert set(TEMPERATURES) == {f" T={temperature:g}" for temperature in options.temperatures}
    assert accepted.metric == acceptance.BROUGHT
    assert TABLES["drafted"].metric == acceptance.RIGHT


# --- what it brings


def test_drafting_measures_the_method_that_is_named(monkeypatch, tmp_path):
    """Plainly, where the gate lets it, and always; and its gains are drawn."""
    model = Model(read_config(ONE_LAYER), make_mesh(1))
    params = random_params(model, 0)

    def tiny(options):
        return SimpleNamespace(engine=Engine(model, params, options), tokenizer=None)

    monkeypatch.setattr(command, "LLM", tiny)
    monkeypatch.setattr(command.texts, "beginnings", lambda *sizes: iter([(1, 2, 3), (4, 5)]))
    monkeypatch.setattr(comparing, "warm", lambda engine, groups: None)
    few = ["--method", "lookahead", "--drafts", "7", "--batches", "1", "2", "--texts", "2", "--new", "9"]
    small = ["--rounds", "1", "--slots", "2", "--max-num-batched-tokens", "64", "--steps-per-dispatch", "2"]
    with one_rectangle():
        command.main(["--output", str(tmp_path), "drafting", *few, *small])
    found = [Record(**one) for one in json.loads((tmp_path / "speculative.json").read_text())["records"]]
    assert {record.case for record in found} == {"demo drafting B1 by lookahead", "demo drafting B2 by lookahead"}
    value = {(record.case, record.implementation, record.metric): record.value for record in found}
    for case in {record.case for record in found}:
        plain = value[case, "jaxinfer", "decode"]
        for way in ("jaxinfer, lookahead", "jaxinfer, lookahead always"):
            faster = value[case, way, comparing.FASTER]
            assert faster == pytest.approx(value[case, way, "decode"] / plain)
        always = value[case, "plan, jaxinfer, lookahead always", comparing.FASTER]
        assert value[case, "plan", comparing.FASTER] == max(always, 1.0)
    assert {path.name for path in tmp_path.iterdir()} == {"speculative.json", "speculative.png"}
    assert (tmp_path / "speculative.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_has_a_panel_for_each_text_and_two_lines_for_each_method():
    cases = (("demo copying B16", "lookup"), ("demo copying B4", "lookup"), ("demo drafting B4 by eagle", "eagle"),
             ("demo drafting B4 by early-exit", "early-exit"))  # fmt: skip
    records = [
        Record(case, implementation, metric, gain, "x")
        for case, method in cases
        for implementation, gain in ((f"jaxinfer, {method}", 2.0), (f"jaxinfer, {method} always", 0.5), ("plan", 9.0))
        for metric in (comparing.FASTER, "decode")
    ]
    found = gains(records)
    assert found["demo copying"] == {("lookup", False): [(4, 2.0), (16, 2.0)], ("lookup", True): [(4, 0.5), (16, 0.5)]}
    assert [*found["demo drafting"]] == [
        ("eagle", False), ("eagle", True), ("early-exit", False), ("early-exit", True)
    ]  # fmt: skip
    copying, drafting = plot_gains(records).axes
    assert [text.get_text() for text in copying.get_legend().get_texts()] == [
        "lookup", "lookup, always", "0.97 of plain decoding"
    ]  # fmt: skip
    assert drafting.get_title() == "demo drafting"


def test_a_plot_is_made_of_what_is_there_already(tmp_path, capsys, monkeypatch):
    record = Record("demo copying B1", "jaxinfer, lookup", comparing.FASTER, 2.0, "x")
    command.update(command.NAME, {"device": "none"}, [record], [], tmp_path)
    command.main(["--output", str(tmp_path), "plot"])
    assert (tmp_path / "speculative.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "speculative.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    command.main(["--output", str(tmp_path), "plot"])
    assert "pip install 'jaxinfer[plots]'" in capsys.readouterr().out
    assert not (tmp_path / "speculative.png").exists()

"""Text that was written once, and an engine that is made to write it again."""

import json
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks.record import Record
from benchmarks.serving.workload import Job
from benchmarks.speculative import __main__ as command
from benchmarks.speculative import comparing, replaying
from benchmarks.speculative.methods import shaped
from benchmarks.speculative.texts import copies
from benchmarks.tables import TABLES
from jaxinfer.decode.speculative import DraftModel, PromptLookup
from jaxinfer.engine import Engine
from jaxinfer.engine.gate import Gate
from jaxinfer.llm import DEMO
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.roofline import tokens_per_step
from jaxinfer.text.tokenizer import Tokenizer
from tests.engine.tiny import CONFIG, ONE_LAYER, OPTIONS, one_rectangle
from tests.model.random_params import random_params

METHOD = PromptLookup(3)
WRITTEN = [
    ((0, 1, 2, 3, 4, 5, 1, 2), (3, 4, 5, 6, 7, 6, 7, 6, 7, 6, 7, 6, 7, 1, 2, 3)),
    ((9, 8, 7, 6, 5, 4, 3), (9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 9, 8, 7, 6, 9, 1)),
    ((1, 1, 1), (2, 3, 5, 7, 9, 8, 6, 4, 2, 0, 2, 3, 7, 5, 6, 5)),
]


@pytest.fixture(scope="module")
def texts() -> list[replaying.Text]:
    jobs = [Job(prompt, len(output)) for prompt, output in WRITTEN]
    return replaying.recorded(jobs, [output for _, output in WRITTEN], METHOD)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    model, options = Model(read_config(ONE_LAYER), make_mesh(1)), replace(OPTIONS, enable_prefix_caching=False)
    with one_rectangle():
        yield Engine(model, random_params(model, 0), replace(options, speculation=METHOD))


def test_prompts_are_files_with_the_beginning_of_a_copy():
    tokenizer = Tokenizer.from_folder(DEMO)
    found = copies(tokenizer, 16)
    assert len(set(found)) == 16
    assert max(map(len, found)) + command.parse(["copying"]).new <= 1024
    for ids in found:
        text, _, rest = tokenizer.decode(ids).partition("\n\n\n# The same, with ")
        new, old = rest.partition(":")[0].split(" in the place of ")
        assert new == f"new_{old}"
        begun = rest.partition(":\n\n")[2]
        assert text.replace(old, new).startswith(begun[: len(begun) // 2])


def test_what_is_recorded_says_how_many_proposals_are_right(texts, tmp_path):
    for text in texts:
        assert sum(text.accepted) + len(text.accepted) == len(text.output) - 1
    assert texts[0].accepted[0] == 2  # 4 5 follow 1 2 3, and then comes no 1
    assert max(texts[0].accepted) == 3
    replaying.write(texts, {"device": "none"}, tmp_path / "results" / "copied.json")
    assert replaying.read(tmp_path / "results" / "copied.json") == texts
    with pytest.raises(FileNotFoundError, match="the part `copying` records it"):
        replaying.read(tmp_path / "copied.json")


def test_a_replay_writes_the_recorded_texts_with_the_recorded_acceptance(engine, texts):
    """Plainly and with proposals, together and one after another."""
    jobs = replaying.replay(engine, texts)
    ends = [job.prompt[0] // 10 for job in jobs]
    assert ends == [0, 1, 2]
    for gate in (comparing.Shut(engine.layout), Gate(engine.layout)):
        took = comparing.run(engine, gate, jobs, batch=2)
        assert [[token % 10 for token in output] for output in took.texts] == [[*text.output] for text in texts]
    steps = [count for text in texts for count in text.accepted]
    assert took.drafts == len(steps)
    assert took.accepted == tuple(sum(count >= place for count in steps) / len(steps) for place in (1, 2, 3))
    with pytest.raises(ValueError, match="11 texts of 10 tokens each need 110; there are 104"):
        replaying.replay(engine, (texts * 4)[:11])


def test_what_is_right_at_each_place_is_what_is_accepted_in_the_steps(engine, texts):
    """The engine is asked at each place of its texts; the steps were searched for on the host."""
    jobs = replaying.replay(engine, texts)
    outputs = [[base + token for token in text.output] for text, base in zip(texts, (0, 10, 20), strict=True)]
    found = replaying.drafted(engine, jobs, outputs)
    assert [text.accepted for text in found] == [text.accepted for text in texts]
    assert [len(text.right) for text in found] == [len(text.output) - 1 for text in texts]


RIGHT = [(2, 1, 0, 3, 0, 0, 0, 1, 0, 2, 0, 0, 0, 1, 0), (0, 3, 1, 1, 1, 3, 0, 0, 0, 2, 1, 1, 0, 0, 0)]
STEPS = [(2, 3, 1, 2, 0, 1), (0, 3, 3, 2, 0, 0, 0)]  # as one comes after the other


@pytest.mark.parametrize("name", ["draft", "medusa", "eagle", "early-exit"])
def test_a_replayed_method_is_right_where_the_recorded_one_was(tmp_path, name):
    """A chain, a tree, and one that grows."""
    (tmp_path / "config.json").write_text(json.dumps(ONE_LAYER))
    model = Model(read_config(CONFIG if name == "early-exit" else ONE_LAYER), make_mesh(1))
    (method,) = shaped(name, [{"medusa": 6, "eagle": 6}.get(name, 3)], str(tmp_path), model)
    recorded = [replaying.Text(*text, right=right) for text, right in zip(WRITTEN, RIGHT, strict=False)]
    options = replace(OPTIONS, enable_prefix_caching=False)
    changed = replaying.replayed(method, recorded, ONE_LAYER["vocab_size"])
    with one_rectangle():
        engine = Engine(model, random_params(model, 0), replace(options, speculation=changed))
        gate = Gate(engine.layout)
        took = comparing.run(engine, gate, replaying.replay(engine, recorded), batch=2)
    assert [[token % 10 for token in output] for output in took.texts] == [[*text.output] for text in recorded]
    steps = [count for counts in STEPS for count in counts]
    assert took.drafts == len(steps)
    assert took.accepted[:3] == tuple(sum(count >= place for count in steps) / len(steps) for place in (1, 2, 3))
    assert not any(took.accepted[3:])
    assert comparing.ways(engine)[0] == f"jaxinfer, {name}"


def test_speculation_stands_beside_plain_decoding_and_the_plan(engine, texts):
    jobs = replaying.replay(engine, texts)
    records = comparing.compare(engine, "tiny B2", jobs, 2, 1)
    value = {(record.implementation, record.metric): record.value for record in records}
    assert {record.case for record in records} == {"tiny B2"}
    for way in comparing.ways(engine):
        assert value[way, comparing.FASTER] > 0
        assert value[way, "decode"] > 0
    _, always = comparing.ways(engine)
    right = [value[always, f"first {place} right"] / 100 for place in (1, 2, 3)]
    assert value[always, "tokens of a step with proposals"] == pytest.approx(tokens_per_step(right))
    assert value["plan", comparing.FASTER] >= 1


@pytest.mark.parametrize(
    ("table", "part", "name"),
    [
        ("copying", ["copying"], "demo copying"),
        ("replay", ["replay"], "llama-3-8b replaying"),
        ("drafting", ["drafting"], "demo drafting"),
        ("replay-by-method", ["replay", "--method", "draft"], "llama-3-8b replaying drafts"),
        ("random-text", ["random"], "llama-3-8b random text"),
    ],
)
def test_the_tables_have_the_cases_that_are_measured(table, part, name):
    cases = {f"{name} B{batch}" for batch in command.parse(part).batches}
    assert set(TABLES[table].columns) == cases
    assert TABLES[table].metric == comparing.FASTER


def test_a_replay_proposes_as_many_tokens_as_what_it_replays():
    parsed = [command.parse(part) for part in (["copying"], ["replay"], ["drafting"])]
    assert [options.drafts for options in parsed] == [8, 8, 3]
    assert command.parse(["replay", "--method", "draft"]).drafts == 3
    assert command.parse(["replay", "--method", "draft", "--drafts", "2"]).drafts == 2


def first_right(texts: list[replaying.Text]) -> float:
    """Percent of the first proposed tokens."""
    counts = [count for text in texts for count in text.accepted]
    return 100 * sum(count > 0 for count in counts) / len(counts)


def test_the_commands(engine, texts, tmp_path, monkeypatch):
    """The engine that replays the texts is the demo model of the first command: it writes one of them."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(ONE_LAYER))
    folder, results = tmp_path / "tiny", tmp_path / "results"
    (job, *_) = replaying.replay(engine, texts)
    monkeypatch.setattr(comparing, "warm", lambda engine, groups: None)
    monkeypatch.setattr(command.texts, "copies", lambda tokenizer, count: [job.prompt] * count)
    monkeypatch.setattr(command, "LLM", lambda options: SimpleNamespace(engine=engine, tokenizer=None))
    monkeypatch.setattr(command, "Engine", lambda model, params, options: engine)
    monkeypatch.setattr(Model, "random_params", lambda model: random_params(model, 0))
    few = ["--batches", "1", "--drafts", "3", "--rounds", "1"]
    command.main(["--output", str(results), "copying", "--texts", "1", "--new", str(job.output), *few])
    assert replaying.read(results / command.COPIED) == texts[:1]
    replaying.write(texts, {}, results / command.COPIED)
    command.main(["--output", str(results), "replay", "--model", str(folder), *few])
    records = json.loads((results / "speculative.json").read_text())["records"]
    right = {record["case"]: record["value"] for record in records if record["metric"] == "first 1 right"}
    assert right == {
        "demo copying B1": pytest.approx(first_right(texts[:1])),
        f"{folder} replaying B1": pytest.approx(first_right([*texts, texts[0]])),
    }


def test_a_replay_by_another_method_has_cases_of_its_own(engine, texts, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(ONE_LAYER))
    kept = [replace(text, right=(0,) * (len(text.output) - 1)) for text in texts]
    replaying.write(kept, {}, tmp_path / command.RECORDED["draft"])
    asked = []

    def make(model, params, options):
        asked.append(options.speculation)
        return engine

    monkeypatch.setattr(command, "Engine", make)
    monkeypatch.setattr(comparing, "warm", lambda engine, groups: None)
    monkeypatch.setattr(comparing, "compare", lambda engine, case, *rest: [Record(case, "it", "decode", 1.0, "tok/s")])
    model = ["--model", str(tmp_path), "--draft-model", str(tmp_path), "--batches", "1", "4"]
    monkeypatch.setattr(Model, "random_params", lambda model, seed=0: random_params(model, seed))
    command.main(["--output", str(tmp_path), "replay", "--method", "draft", *model])
    records = json.loads((tmp_path / "speculative.json").read_text())["records"]
    assert [record["case"] for record in records] == [f"{tmp_path} replaying drafts B{b} by draft" for b in (1, 4)]
    assert [(type(method), method.num_speculative_tokens) for method in asked] == [(DraftModel, 3)]


def test_nothing_is_compiled_after_the_warm_up(texts):
    """For batches in which prompts come in several steps, beside others too."""
    model, options = Model(read_config(ONE_LAYER), make_mesh(1)), replace(OPTIONS, enable_prefix_caching=False)
    jobs = [Job(tuple(range(1, 2 + 9 * number)), 7) for number in range(1, 7)]
    with one_rectangle():
        engine = Engine(model, random_params(model, 0), replace(options, speculation=METHOD))
        groups = comparing.groups_of(jobs, [1, 4])
        assert [len(group) for group in groups] == [1, 1, 1, 1, 4]
        comparing.warm(engine, groups)
        ready = engine.metrics.compilations
        for batch in (1, 4):
            comparing.compare(engine, f"tiny B{batch}", jobs, batch, 1)
    assert engine.metrics.compilations == ready


def test_of_random_text_nothing_that_is_proposed_is_right(tmp_path):
    """By a model that writes it."""
    (tmp_path / "config.json").write_text(json.dumps(ONE_LAYER))
    part = ["random", "--model", str(tmp_path), "--batches", "2", "--texts", "2", "--new", "24", "--rounds", "1"]
    small = ["--slots", "2", "--max-num-batched-tokens", "256", "--steps-per-dispatch", "2", "--drafts", "3"]
    with one_rectangle():
        command.main(["--output", str(tmp_path), *part, *small])
    records = [Record(**record) for record in json.loads((tmp_path / "speculative.json").read_text())["records"]]
    value = {(record.implementation, record.metric): record.value for record in records}
    assert {record.case for record in records} == {f"{tmp_path} random text B2 by lookup"}
    assert value["jaxinfer, lookup always", "tokens of a step with proposals"] == 1
    assert value["jaxinfer, lookup always", comparing.FASTER] > 0

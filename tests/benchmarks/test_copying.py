"""Text that copies, and an engine that is made to write it again."""

import json
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks import copying, speculative
from benchmarks.serving.workload import Job
from benchmarks.tables import TABLES
from jaxinfer.decode.speculative import PromptLookup
from jaxinfer.engine import Engine, TokenLogprobs
from jaxinfer.engine.gate import Gate
from jaxinfer.llm import DEMO
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.roofline import find_hardware, tokens_per_step
from jaxinfer.text.tokenizer import Tokenizer
from tests.engine.tiny import ONE_LAYER, OPTIONS, one_rectangle
from tests.model.random_params import random_params

METHOD = PromptLookup(3)
WRITTEN = [
    ((0, 1, 2, 3, 4, 5, 1, 2), (3, 4, 5, 6, 7, 6, 7, 6, 7, 6, 7, 6, 7, 1, 2, 3)),
    ((9, 8, 7, 6, 5, 4, 3), (9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 9, 8, 7, 6, 9, 1)),
    ((1, 1, 1), (2, 3, 5, 7, 9, 8, 6, 4, 2, 0, 2, 3, 7, 5, 6, 5)),
]


@pytest.fixture(scope="module")
def texts() -> list[copying.Text]:
    jobs = [Job(prompt, len(output)) for prompt, output in WRITTEN]
    return copying.recorded(jobs, [output for _, output in WRITTEN], METHOD)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    model, options = Model(read_config(ONE_LAYER), make_mesh(1)), replace(OPTIONS, enable_prefix_caching=False)
    with one_rectangle():
        yield Engine(model, random_params(model, 0), replace(options, speculation=METHOD))


def test_prompts_are_files_with_the_beginning_of_a_copy():
    tokenizer = Tokenizer.from_folder(DEMO)
    found = copying.prompts(tokenizer, 16)
    assert len(set(found)) == 16
    assert max(map(len, found)) + speculative.parse(["copying"]).new <= 1024
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
    copying.write(texts, {"device": "none"}, tmp_path / "results" / "copied.json")
    assert copying.read(tmp_path / "results" / "copied.json") == texts
    with pytest.raises(FileNotFoundError, match="the part `copying` records it"):
        copying.read(tmp_path / "copied.json")


def test_a_replay_writes_the_recorded_texts_with_the_recorded_acceptance(engine, texts):
    """Plainly and with proposals, together and one after another."""
    jobs = copying.replay(engine, texts)
    ends = [job.prompt[0] // 10 for job in jobs]
    assert ends == [0, 1, 2]
    for gate in (copying.Shut(engine.layout), Gate(engine.layout)):
        took = copying.run(engine, gate, jobs, batch=2)
        assert [[token % 10 for token in output] for output in took.texts] == [[*text.output] for text in texts]
    steps = [count for text in texts for count in text.accepted]
    assert took.drafts == len(steps)
    assert took.accepted == tuple(sum(count >= place for count in steps) / len(steps) for place in (1, 2, 3))
    with pytest.raises(ValueError, match="11 texts of 10 tokens each need 110; there are 104"):
        copying.replay(engine, (texts * 4)[:11])


SAID = [(9, 4, 5, 0, 7, 6, 7, 6, 7, 6, 0, 6, 7, 1, 2, 0), (0, 8, 0, 6, 5, 4, 0, 2, 1, 0, 9, 8, 7, 0, 9, 1)]


@pytest.fixture(scope="module")
def drafted() -> list[copying.Text]:
    """Two of the texts with a draft that is right mostly."""
    tops = [[None, *(TokenLogprobs(token, 0.0, ((token, 0.0), (3, -1.0))) for token in said)] for said in SAID]
    outputs = [SimpleNamespace(prompt_logprobs=[None] * (len(prompt) - 1) + top)
               for (prompt, _), top in zip(WRITTEN, tops, strict=False)]  # fmt: skip
    draft = SimpleNamespace(generate=lambda whole, params: outputs)
    jobs = [Job(prompt, len(output)) for prompt, output in WRITTEN[:2]]
    return copying.drafted(jobs, [output for _, output in WRITTEN[:2]], draft, 3)


def test_what_a_draft_says_decides_what_is_right_in_each_step(drafted):
    assert [text.said for text in drafted] == SAID
    # Of 4 5 6 7 6 7 6 7 6 7 6 7 1 2 3 the draft has 4 5, then not 6, and so on.
    assert drafted[0].accepted == (2, 3, 2, 3, 0)
    for text in drafted:
        assert sum(text.accepted) + len(text.accepted) == len(text.output) - 1


def test_a_replayed_draft_is_right_where_the_recorded_one_was(drafted):
    model, small = (Model(read_config(config), make_mesh(1)) for config in (ONE_LAYER, ONE_LAYER))
    method = copying.replayed_draft(drafted, small, random_params(small, 1), 3)
    options = replace(OPTIONS, enable_prefix_caching=False, speculation=method)
    with one_rectangle():
        engine = Engine(model, random_params(model, 0), options)
        took = copying.run(engine, Gate(engine.layout), copying.replay(engine, drafted), batch=2)
    assert [[token % 10 for token in output] for output in took.texts] == [[*text.output] for text in drafted]
    steps = [count for text in drafted for count in text.accepted]
    assert took.drafts == len(steps)
    assert took.accepted == tuple(sum(count >= place for count in steps) / len(steps) for place in (1, 2, 3))


def test_speculation_stands_beside_plain_decoding_and_the_plan(engine, texts):
    jobs = copying.replay(engine, texts)
    records = copying.compare(engine, "tiny", jobs, 2, 1, find_hardware("h200"))
    value = {(record.implementation, record.metric): record.value for record in records}
    assert {record.case for record in records} == {"tiny B2"}
    for way in copying.ways(engine):
        assert value[way, copying.FASTER] > 0
        assert value[way, "decode"] > 0
    _, always = copying.ways(engine)
    right = [value[always, f"first {place} right"] / 100 for place in (1, 2, 3)]
    assert value[always, "tokens of a step with proposals"] == pytest.approx(tokens_per_step(right))
    assert value["plan", copying.FASTER] >= 1


@pytest.mark.parametrize(
    ("table", "part", "name"),
    [
        ("copying", ["copying"], "demo copying"),
        ("replay", ["replay"], "llama-3-8b replaying"),
        ("drafting", ["drafting"], "demo drafting"),
        ("replayed-draft", ["replay", "--method", "draft"], "llama-3-8b replaying with llama-3.2-1b"),
    ],
)
def test_the_tables_have_the_cases_that_are_measured(table, part, name):
    cases = {f"{name} B{batch}" for batch in speculative.parse(part).batches}
    assert set(TABLES[table].columns) == cases
    assert TABLES[table].metric == copying.FASTER


def test_a_replay_proposes_as_many_tokens_as_what_it_replays():
    parsed = [speculative.parse(part) for part in (["copying"], ["replay"], ["drafting"])]
    assert [options.drafts for options in parsed] == [8, 8, 3]
    assert speculative.parse(["replay", "--method", "draft"]).drafts == 3
    assert speculative.parse(["replay", "--method", "draft", "--drafts", "2"]).drafts == 2


def first_right(texts: list[copying.Text]) -> float:
    """Percent of the first proposed tokens."""
    counts = [count for text in texts for count in text.accepted]
    return 100 * sum(count > 0 for count in counts) / len(counts)


def test_the_commands(engine, texts, tmp_path, monkeypatch):
    """The engine that replays the texts is the demo model of the first command: it writes one of them."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(ONE_LAYER))
    folder, results = tmp_path / "tiny", tmp_path / "results"
    (job, *_) = copying.replay(engine, texts)
    monkeypatch.setattr(copying, "warm", lambda engine: None)
    monkeypatch.setattr(copying, "prompts", lambda tokenizer, count: [job.prompt] * count)
    monkeypatch.setattr(speculative, "LLM", lambda options: SimpleNamespace(engine=engine, tokenizer=None))
    monkeypatch.setattr(speculative, "Engine", lambda model, params, options: engine)
    monkeypatch.setattr(Model, "random_params", lambda model: random_params(model, 0))
    few = ["--batches", "1", "--drafts", "3", "--rounds", "1"]
    speculative.main(["--output", str(results), "copying", "--texts", "1", "--new", str(job.output), *few])
    assert copying.read(results / speculative.RECORDED["lookup"]) == texts[:1]
    copying.write(texts, {}, results / speculative.RECORDED["lookup"])
    speculative.main(["--output", str(results), "replay", "--model", str(folder), *few])
    records = json.loads((results / "speculative.json").read_text())["records"]
    right = {record["case"]: record["value"] for record in records if record["metric"] == "first 1 right"}
    assert right == {
        "demo copying B1": pytest.approx(first_right(texts[:1])),
        f"{folder} replaying B1": pytest.approx(first_right([*texts, texts[0]])),
    }

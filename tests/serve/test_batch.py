"""Files of requests: every one is answered once, however often the command is interrupted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import to_json
from typer.testing import CliRunner

from jaxinfer.cli import app
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.serve.batch import answer_lines, append, done, read_lines
from jaxinfer.serve.errors import given_up
from tests.engine.tiny import assert_clean, tiny_folder, warm_llm

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}
DRAWN: dict[str, Any] = {"temperature": 0.7, "seed": 3}
MESSAGES = [{"role": "user", "content": "hello"}]
ANSWERED = '{"id":"batch_req_1","custom_id":"a","response":{"status_code":200,"body":{}},"error":null}\n'


@pytest.fixture
def llm(tmp_path_factory):
    return warm_llm(tmp_path_factory.getbasetemp())


def line(name: str, url: str = "/v1/completions", method: str = "POST", **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": method, "url": url, "body": GREEDY | body}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def answers(llm, path: Path) -> dict[str, Any]:
    """Responses by `custom_id`."""
    found = list(answer_lines(llm, "tiny", read_lines(path)))
    assert all(told["error"] is None and told["id"].startswith("batch_req_") for told in found)
    assert len({told["custom_id"] for told in found}) == len(found)
    return {told["custom_id"]: told["response"] for told in found}


def test_answers_are_those_of_the_model(llm, tmp_path):
    path = write(tmp_path / "in.jsonl", [
        line("text", prompt="abc"),
        line("two prompts, twice each", prompt=["abc", "de"], n=2, **DRAWN),
        line("a chat", "/v1/chat/completions", messages=MESSAGES, model="tiny"),
    ])  # fmt: skip
    found = answers(llm, path)
    assert all(response["status_code"] == 200 for response in found.values()), found
    params = SamplingParams(**GREEDY)
    (text,) = [choice["text"] for choice in found["text"]["body"]["choices"]]
    assert text == llm.generate("abc", params)[0].outputs[0].text
    choices = found["two prompts, twice each"]["body"]["choices"]
    drawn = llm.generate(["abc", "de"], SamplingParams(**(GREEDY | DRAWN), n=2))
    texts = [one.text for output in drawn for one in output.outputs]
    assert [(choice["index"], choice["text"]) for choice in choices] == list(enumerate(texts))
    prompts = sum(len(output.prompt_token_ids) for output in drawn)
    used = {"prompt_tokens": prompts, "completion_tokens": 24, "total_tokens": prompts + 24}
    assert found["two prompts, twice each"]["body"]["usage"] == used
    (chat,) = found["a chat"]["body"]["choices"]
    assert chat["message"]["content"] == llm.chat(MESSAGES, params)[0].outputs[0].text
    assert_clean(llm)


@pytest.mark.parametrize(
    ("given", "status", "param"),
    [
        (line("x", prompt="abc", temperature=-1.0), 400, "temperature"),
        (line("x", prompt="abc", max_tokens=1000), 400, "max_tokens"),
        (line("x", prompt=[500]), 400, "prompt"),
        (line("x", prompt=[]), 400, "prompt"),
        (line("x", prompt="abc", colour="red"), 400, "colour"),
        (line("x", prompt="abc", stream=True), 400, "stream"),
        (line("x", prompt="abc", model="another"), 404, "model"),
        (line("x", "/v1/embeddings", input="abc"), 404, "url"),
        (line("x", method="GET", prompt="abc"), 400, "method"),
        (line("x", "/v1/chat/completions", messages=[{"role": "alien", "content": ""}]), 400, "messages[0].role"),
    ],
)
def test_what_cannot_be_served_is_an_answer_too(llm, tmp_path, given, status, param):
    path = write(tmp_path / "in.jsonl", [given, line("fine", prompt="abc")])
    found = answers(llm, path)
    assert found["x"]["status_code"] == status
    assert found["x"]["body"]["error"]["param"] == param
    assert found["fine"]["status_code"] == 200


@pytest.mark.parametrize(
    ("reason", "status", "code"),
    [("error", 500, "internal_error"), ("abort", 500, "aborted"), ("timeout", 503, "timeout")],
)
def test_what_the_engine_gives_up_is_the_error_that_the_server_sends(llm, tmp_path, monkeypatch, reason, status, code):
    """Whichever choice of a request it is."""
    path = write(tmp_path / "in.jsonl", [line("x", prompt=["abc", "de"], n=2, **DRAWN), line("fine", prompt="abc")])
    generate = llm.generate_iter

    def ended(*asked, **options):
        for place, output in generate(*asked, **options):
            if place == 1:
                output.outputs[1] = replace(output.outputs[1], finish_reason=reason)
            yield place, output

    monkeypatch.setattr(llm, "generate_iter", ended)
    found = answers(llm, path)
    assert found["x"]["status_code"] == status
    assert found["x"]["body"] == given_up(reason).body
    assert found["x"]["body"]["error"].items() >= {"type": "server_error", "code": code}.items()
    assert found["fine"]["status_code"] == 200


def test_the_command_counts_what_failed(tmp_path_factory, tmp_path, monkeypatch):
    def broken(output, row, sequence):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("jaxinfer.engine.engine.read_row", broken)
    asked, told = write(tmp_path / "in.jsonl", [line("a", prompt="abc")]), tmp_path / "out.jsonl"
    folder = str(tiny_folder(tmp_path_factory.getbasetemp()))
    result = CliRunner().invoke(app, ["batch", str(asked), str(told), "--model", folder, "--max-num-seqs", "2"])
    assert "0 answered, 0 refused, 1 failed, 0 were there already" in result.output
    assert json.loads(told.read_text())["response"]["status_code"] == 500


def test_the_lowest_priority_comes_first(llm, tmp_path):
    path = write(tmp_path / "in.jsonl", [line(str(rank), prompt="abc", priority=rank) for rank in (5, 0, 4, 1, 3, 2)])
    found = list(answers(llm, path))
    assert [set(found[:4]), set(found[4:])] == [set("0123"), set("45")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 2: "),
        ('{"custom_id": "b", "method": "POST", "url": "/v1/completions"}', "line 2: body"),
        ('{"custom_id": 7, "method": "POST", "url": "/v1/completions", "body": {}}', "line 2: custom_id"),
        (json.dumps(line("a", prompt="abc")), "line 2: custom_id 'a' is that of an earlier line"),
    ],
)
def test_a_file_of_other_lines_is_refused_by_its_line(tmp_path, text, words):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(line("a", prompt="abc")) + "\n" + text)
    with pytest.raises(ValueError, match=r"in\.jsonl, line 2: ") as error:
        read_lines(path)
    assert words in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_file_in_another_encoding_is_refused_by_its_line(tmp_path, encoding):
    path = tmp_path / "in.jsonl"
    texts = [json.dumps(line(name, prompt="é"), ensure_ascii=False) for name in ("a", "b")]
    path.write_text(texts[0] + "\n", encoding="utf-8")
    path.write_bytes(path.read_bytes() + texts[1].encode(encoding))
    with pytest.raises(ValueError, match=r"in\.jsonl, line 2: .* is not valid JSON"):
        read_lines(path)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = write(tmp_path / "in.jsonl", [line("a", prompt="abc")])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [each.custom_id for each in read_lines(path)] == ["a"]


def test_line_separators_within_a_prompt_end_no_line(tmp_path):
    path, prompt = tmp_path / "in.jsonl", "a\u2028b\u2029c\x85d"
    path.write_text(json.dumps(line("a", prompt=prompt), ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert [each.body["prompt"] for each in read_lines(path)] == [prompt]


@pytest.mark.parametrize("cut", [1, 9, 60, -1])
def test_a_kill_loses_nothing_and_repeats_nothing(llm, tmp_path, cut):
    lines = [line(str(i), prompt="abc", max_tokens=1 + i) for i in range(7)]
    asked, told = read_lines(write(tmp_path / "in.jsonl", lines)), tmp_path / "out.jsonl"
    running = answer_lines(llm, "tiny", asked)
    with told.open("a") as file:
        for _ in range(3):
            append(file, next(running))
        file.write(to_json(next(running)).decode()[:cut])  # the kill came here
    running.close()
    earlier = done(told)
    assert len(earlier) == 3
    with told.open("a") as file:
        for each in answer_lines(llm, "tiny", [one for one in asked if one.custom_id not in earlier]):
            append(file, each)
    found = [json.loads(text) for text in told.read_text().splitlines()]
    assert sorted(each["custom_id"] for each in found) == [str(i) for i in range(7)]
    used = {each["custom_id"]: each["response"]["body"]["usage"]["completion_tokens"] for each in found}
    assert used == {str(i): 1 + i for i in range(7)}
    assert_clean(llm)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("one\ntwo\nthree", 1),
        ("one", 1),
        ("\n", 1),
        ('{"custom_id": "a"}\n', 1),
        ('["custom_id", "response"]\n', 1),
        (ANSWERED + ANSWERED[:-1] + "\n\n", 3),
        (ANSWERED + json.dumps(line("b", prompt="abc")), 2),
    ],
)
def test_a_file_that_is_no_output_is_left_alone(tmp_path, text, number):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"notes\.txt, line {number}: it is no line of a batch's output"):
        done(path)
    assert path.read_text() == text


def test_answers_do_not_go_into_the_file_of_requests(tmp_path):
    asked = write(tmp_path / "in.jsonl", [line("a", prompt="abc"), line("b", prompt="abc")])
    (tmp_path / "link.jsonl").symlink_to(asked)
    before = asked.read_bytes()
    result = CliRunner().invoke(app, ["batch", str(asked), str(tmp_path / "link.jsonl")])
    assert result.exit_code == 2
    assert "give another one for the answers" in result.output
    assert asked.read_bytes() == before
    assert done(tmp_path / "absent.jsonl") == set()


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    asked = write(tmp_path / "in.jsonl", [line("a", prompt="abc")])
    result = CliRunner().invoke(app, ["batch", str(asked), str(tmp_path / "absent" / "out.jsonl")])
    assert result.exit_code == 2
    assert "No such file or directory" in result.output


def test_the_command_does_what_is_left(tmp_path_factory, tmp_path):
    asked = write(tmp_path / "in.jsonl", [line("a", prompt="abc"), line("b", prompt="abc", n=0)])
    told = tmp_path / "out.jsonl"
    told.write_text(ANSWERED)
    folder = str(tiny_folder(tmp_path_factory.getbasetemp()))
    command = ["batch", str(asked), str(told), "--model", folder, "--max-num-seqs", "2"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "0 answered, 1 refused, 0 failed, 1 were there already" in result.output
    assert [json.loads(text)["custom_id"] for text in told.read_text().splitlines()] == ["a", "b"]
    assert "0 answered, 0 refused, 0 failed, 2 were there already" in CliRunner().invoke(app, command).output

"""Files of requests, in OpenAI's batch format: a line in, a line out, and none twice.

A line of the input is `{"custom_id", "method": "POST", "url", "body"}`, with the body of a completion or a chat. Its
line of the output is `{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error": null}`, written
as soon as it is whole, in the order in which they end. What the model cannot serve, and what the engine gives up, is
answered with the status and the error body that the server would send.
"""

from __future__ import annotations

import json
import uuid
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_json

from jaxinfer.llm import LLM
from jaxinfer.outputs import CompletionOutput
from jaxinfer.serve.endpoints import ENDPOINTS
from jaxinfer.serve.errors import ApiError, given_up, malformed
from jaxinfer.serve.prompts import Asked, Prompts, template_or_reason
from jaxinfer.serve.protocol import BODY_FIELDS
from jaxinfer.serve.responses import Answer, usage
from jaxinfer.serve.worker import longest

METHOD = "POST"
_BEGINNING = b'{"id":"batch_req_'  # of every line that `append` writes


class Line(BaseModel):
    """A request of the file; its body is checked when its turn comes."""

    model_config = ConfigDict(extra="forbid", strict=True)
    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


@dataclass
class Work:
    """A request that runs.

    Attributes:
        spelled: names of fields in its body, where they are others than the sampler's.
        priority: the lower, the sooner it runs.
        left: prompts of its body that have no output yet.
        outputs: what came of each prompt.
    """

    line: Line
    asked: Asked
    answer: Answer
    spelled: dict[str, str]
    priority: int = 0
    left: int = 0
    outputs: dict[int, list[CompletionOutput]] = field(default_factory=dict)


def read_lines(path: Path) -> list[Line]:
    """The requests of a file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: a line is none, by number and field, or has the `custom_id` of another.
    """
    lines: dict[str, Line] = {}
    for number, text in enumerate(path.read_bytes().removeprefix(BOM_UTF8).split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            line = Line.model_validate_json(text)
        except ValidationError as error:
            told = malformed(error, set(Line.model_fields))
            raise ValueError(f"{path}, line {number}: {told.message}") from None
        if line.custom_id in lines:
            raise ValueError(f"{path}, line {number}: custom_id {line.custom_id[:80]!r} is that of an earlier line")
        lines[line.custom_id] = line
    return list(lines.values())


def done(path: Path) -> set[str]:
    """The `custom_id` of every line of an output file. A last line that a kill has cut short is taken off the file.

    Raises:
        ValueError: a line is no answer, or what follows the last one is no beginning of one: the file is another's,
            and stays as it is.
    """
    if not path.exists():
        return set()
    whole, newline, torn = path.read_bytes().rpartition(b"\n")
    lines = whole.split(b"\n") if newline else []
    found = {_answered(path, number, line) for number, line in enumerate(lines, start=1)}
    if torn:
        _cut(path, len(lines) + 1, torn)
    return found


def _answered(path: Path, number: int, line: bytes) -> str:
    """The `custom_id` of an output line."""
    try:
        told = json.loads(line)
        if isinstance(told["custom_id"], str) and isinstance(told["response"]["status_code"], int):
            return told["custom_id"]
    except (ValueError, TypeError, KeyError):
        pass
    raise _foreign(path, number)


def _cut(path: Path, number: int, torn: bytes) -> None:
    """Takes the beginning of an output line off the end of a file."""
    if not torn.startswith(_BEGINNING[: len(torn)]):
        raise _foreign(path, number)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - len(torn))


def _foreign(path: Path, number: int) -> ValueError:
    return ValueError(f"{path}, line {number}: it is no line of a batch's output")


def answer_lines(llm: LLM, name: str, lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
    """The output lines of requests, as they are whole; `name` is the model's in requests and answers."""
    limits = llm.intake.limits
    prompts = Prompts(llm.intake, template_or_reason(llm.folder), longest(llm.engine, limits.context))
    works = []
    for line in lines:
        try:
            works.append(_read(line, name, prompts))
        except ApiError as error:
            yield _told(line, error.status, error.body)
    owners = [(work, index) for work in works for index in range(work.left)]
    tokens = [work.asked[0][index] for work, index in owners]
    params, priorities = [work.asked[1] for work, _ in owners], [work.priority for work, _ in owners]
    for place, output in llm.generate_iter(tokens, params, priority=priorities) if owners else ():
        work, index = owners[place]
        work.outputs[index], work.left = output.outputs, work.left - 1
        if work.left == 0:
            yield _told(work.line, *_answer(work))


def append(file: TextIO, told: dict[str, Any]) -> None:
    """Writes one output line, which then is there whatever becomes of this process."""
    file.write(to_json(told).decode() + "\n")
    file.flush()


def _read(line: Line, name: str, prompts: Prompts) -> Work:
    """Raises ApiError where the request cannot be served."""
    if line.method != METHOD:
        raise ApiError(400, f"method is {line.method[:40]!r}; it must be {METHOD}", param="method")
    if (endpoint := ENDPOINTS.get(line.url)) is None:
        raise ApiError(404, f"url is {line.url[:80]!r}; it must be one of {', '.join(ENDPOINTS)}", param="url")
    try:
        body = endpoint.body.model_validate_json(json.dumps(line.body))
    except ValidationError as error:
        raise malformed(error, BODY_FIELDS) from None
    if body.stream:
        raise ApiError(400, "stream is true; a batch is answered whole", param="stream")
    asked, answer = endpoint.asked(body, prompts, name)
    return Work(line, asked, answer, body.spelled, body.priority or 0, left=len(asked[0]))


def _answer(work: Work) -> tuple[int, dict[str, Any]]:
    """Status and body: an error where the engine gave up any of the outputs."""
    for output in chain(*work.outputs.values()):
        if (error := given_up(output.finish_reason, output.problem, work.spelled)) is not None:
            return error.status, error.body
    return 200, _body(work)


def _body(work: Work) -> dict[str, Any]:
    """The whole answer: the n choices of the first prompt come first."""
    prompts, params = work.asked
    choices = [
        CompletionOutput(params.n * place + one.index, one.text, one.token_ids, one.logprobs, one.finish_reason,
                         one.stop_reason)
        for place in range(len(prompts))
        for one in work.outputs[place]
    ]  # fmt: skip
    used = usage(sum(map(len, prompts)), sum(len(choice.token_ids) for choice in choices))
    return work.answer.body(choices, used)


def _told(line: Line, status: int, body: dict[str, Any]) -> dict[str, Any]:
    response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": body}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id, "response": response, "error": None}

"""Errors as OpenAI's API writes them: `{"error": {"message", "type", "param", "code"}}` and a status."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from jaxinfer.decode.structured_params import shortened
from jaxinfer.engine.request import FinishReason

_NAME = 80  # characters of an unknown field's name that are told
_FIELD = re.compile(r"(?:SamplingParams: )?(\w+) (?:=|has) ")


class ApiError(Exception):
    """A request that gets no answer: why, whose fault it is by `status`, and the field that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self._type, "param": self.param, "code": self.code}}

    @property
    def _type(self) -> str:
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"


def refused(problems: Sequence[str], param: str, spelled: dict[str, str] | None = None) -> ApiError:
    """What the model cannot serve, as a 400 with the field of the first problem.

    Args:
        problems: sentences, such as `max_tokens = 7 must be in 1..4`.
        param: the field where a sentence does not begin with one.
        spelled: names that the caller used, where they are others than the sampler's.
    """
    named = _FIELD.match(problems[0])
    field = named[1] if named else param
    message = "; ".join(problem.removeprefix("SamplingParams: ") for problem in problems)
    for theirs, ours in (spelled or {}).items():
        field = ours if field == theirs else field
        message = re.sub(rf"\b{theirs}(?= =| has )", ours, message)
    too_long = "context of" in message or "pages of" in message
    return ApiError(400, message, param=field, code="context_length_exceeded" if too_long else None)


def given_up(
    reason: FinishReason | None, problem: str | None = None, spelled: dict[str, str] | None = None
) -> ApiError | None:
    """What is told of an output that the engine gave up; None where it goes on, or came to its end.

    Args:
        problem: of the output: why, where the reason is `constraint`.
        spelled: as in `refused`.
    """
    if reason == "constraint":
        assert problem is not None
        return refused([problem], "structured_outputs", spelled)
    if reason == "abort":
        return ApiError(500, "the engine failed while the request ran; try again", code="aborted")
    if reason == "error":
        return ApiError(500, "this request failed in the engine; its log says why", code="internal_error")
    if reason == "timeout":
        message = "the request waited longer than one may wait here; try again later"
        return ApiError(503, message, code="timeout", headers={"Retry-After": "10"})
    return None


def malformed(error: ValidationError, fields: set[str]) -> ApiError:
    """A body that does not fit its model, as a 400 with the path of the first field, such as `messages[2].role`.

    Args:
        fields: names that a path can be made of; what else pydantic names is the type that it tried.
    """
    first, *others = error.errors(include_url=False, include_context=False)
    # Of the types that a value may have, the one that fits further is meant.
    inside = [other for other in others if _path(other["loc"], fields).startswith(_path(first["loc"], fields) + "[")]
    first = max(inside, key=_reached) if inside else first
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['msg'].partition(': ')[2]}", code="invalid_json")
    param = _path(first["loc"], fields)
    if first["type"] == "extra_forbidden":
        *where, name = first["loc"]  # the caller's own, of any length
        name = str(name)
        shown = name if len(name) <= _NAME else name[: _NAME - 3] + "..."
        param = ".".join(filter(None, (_path(where, fields), shown)))
        return ApiError(400, f"{param} is not a field that this server knows", param=param, code="unknown_field")
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_field")
    alternatives = [first["msg"], *(other["msg"] for other in others if _path(other["loc"], fields) == param)]
    said = " or ".join(dict.fromkeys(text.removeprefix("Value error, ") for text in alternatives))
    return ApiError(400, f"{param or 'the body'}: {said}, got {shortened(first['input'])}", param=param or None)


def _reached(error: ErrorDetails) -> list[int]:
    """How far into the lists a value was right."""
    return [part for part in error["loc"] if isinstance(part, int)]


def _path(loc: Sequence[str | int], fields: set[str]) -> str:
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in fields:
            path += f".{part}" if path else part
    return path

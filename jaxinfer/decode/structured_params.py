"""What the text of an output must look like: fields named as in vLLM's `StructuredOutputsParams`."""

from __future__ import annotations

import json as json_format
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

MAX_GRAMMAR = 1 << 18  # characters


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """One of several ways to say which texts an output may be. Exactly one is given.

    Attributes:
        json: a JSON schema, as a dict or as text.
        regex: a regular expression that the whole text matches, in the syntax of Rust's `regex`: no look-around, no
            references to groups.
        choice: the texts that there are.
        grammar: a context-free grammar, in llguidance's form of Lark or in GBNF.
        json_object: True for any JSON object.

    Raises:
        ValueError: on construction, with the field, its value and what is allowed.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        if problem := next(_problems(self), None):
            raise ValueError(f"structured_outputs has {problem}")

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        (name,) = _given(self)
        return name

    @property
    def text(self) -> str:
        """What is given, as text; the choices as a JSON list."""
        value = getattr(self, self.kind)
        return value if isinstance(value, str) else json_format.dumps(value)


def _given(params: StructuredOutputsParams) -> list[str]:
    values = {field.name: getattr(params, field.name) for field in fields(params)}
    return [name for name, value in values.items() if value is not None and not (name == "json_object" and not value)]


def _problems(params: StructuredOutputsParams) -> Iterator[str]:
    if not isinstance(params.json_object, bool | None):
        yield f"json_object = {shortened(params.json_object)}; it must be True, False or None"
    names = [field.name for field in fields(params)]
    if len(given := _given(params)) != 1:
        yield f"{' and '.join(given) or 'none'} of {', '.join(names)}; exactly one must be given"
        return
    for name, allowed, holds in (
        ("json", "a JSON schema, as a dict or as text", _is_schema),
        ("regex", "text that is not empty", _is_text),
        ("choice", "a list of texts, none of them empty", _is_choice),
        ("grammar", "text that is not empty", _is_text),
    ):
        value = getattr(params, name)
        if value is not None and not holds(value):
            yield f"{name} = {shortened(value)}; it must be {allowed}"
            return
    if (size := len(params.text)) > MAX_GRAMMAR:
        yield f"{params.kind} of {size} characters; at most {MAX_GRAMMAR} are allowed"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_choice(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(_is_text(text) for text in value)


def _is_schema(value: Any) -> bool:
    if not isinstance(value, dict):
        return _is_text(value)
    try:
        return _is_text(json_format.dumps(value, allow_nan=False, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError):
        return False


_SHOWN = 80  # characters of a value
_REPR = reprlib.Repr(  # cuts the middle: what is shown is as `repr` has it
    maxlist=_SHOWN, maxdict=_SHOWN, maxstring=2 * _SHOWN, maxlong=2 * _SHOWN, maxother=2 * _SHOWN
)


def shortened(value: Any) -> str:
    """A value as an error shows it; what is not shown of a large one costs no time."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number that is too long to write"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."

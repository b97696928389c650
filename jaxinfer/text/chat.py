"""Chat templates: the Jinja program of a checkpoint that turns messages into a prompt.

A template comes with a checkpoint from anywhere, so it runs in a sandbox that can neither reach Python's
internals nor change what it is given.
"""

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Self

import jinja2
from jinja2.runtime import Context
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment

from jaxinfer.text.files import check_text, read_json, special_tokens

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled template and the special tokens that it may name, such as `bos_token`."""

    template: jinja2.Template
    special_tokens: dict[str, str]

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Reads `chat_template.jinja`, or `chat_template` of `tokenizer_config.json`.

        Raises:
          ValueError: there is no template, or it or a special token is malformed; the message names file and field.
        """
        folder = Path(folder)
        source = _read_source(folder)
        try:
            return cls(_environment().from_string(source), special_tokens(folder))
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat_template of {folder}, line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: object) -> str:
        """The prompt text; encode it with `add_special_tokens=False`, for the template wrote them.

        Args:
          messages: at least one `{"role": ..., "content": ...}`, both strings.
          add_generation_prompt: whether to open the assistant's turn.
          variables: what else this template knows, such as `tools`.

        Raises:
          ValueError: a message is malformed, or the template refuses the messages or breaks the sandbox.
        """
        check_messages(messages)
        # Hugging Face defines these two always; templates compare them with none.
        names = {"tools": None, "documents": None} | self.special_tokens | variables
        try:
            return self.template.render(names, messages=list(messages), add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program of somebody else's, and may raise what it likes
            raise ValueError(f"chat_template cannot render these messages: {error}") from error


def check_messages(messages: Sequence[Message]) -> None:
    """Raises ValueError naming the first field, such as `messages[2].role`, that is missing or no string."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages must be a list of at least one message, got {reprlib.repr(messages)}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            found = reprlib.repr(message)
            raise ValueError(f"messages[{index}] must be a mapping with role and content, got {found}")
        for field in ("role", "content"):
            if field not in message:
                raise ValueError(f"messages[{index}].{field} is missing")
            check_text(message[field], f"messages[{index}].{field}")
        if not message["role"]:
            raise ValueError(f"messages[{index}].role must not be empty")


def _read_source(folder: Path) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _decoded(file)
    config = folder / "tokenizer_config.json"
    source = read_json(config).get("chat_template")
    if isinstance(source, list):  # several templates by name
        source = _default(config, dict(_named(config, index, entry) for index, entry in enumerate(source)))
    elif not isinstance(source, str | None):
        allowed = "a string, null, or a list of objects with name and template"
        raise ValueError(f"{config}: chat_template is {reprlib.repr(source)}; it must be {allowed}")
    if source is None:
        raise ValueError(
            f"{folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)"
            ": give a prompt instead of messages"
        )
    return source


def _decoded(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not valid UTF-8: {error}") from error


def _named(config: Path, index: int, entry: Any) -> tuple[str, str]:
    """Name and source of one of several templates."""
    fields = entry if isinstance(entry, dict) else {}
    name, template = fields.get("name"), fields.get("template")
    if not isinstance(name, str) or not isinstance(template, str):
        allowed = "an object whose name and template are strings"
        raise ValueError(f"{config}: chat_template[{index}] is {reprlib.repr(entry)}; it must be {allowed}")
    return name, template


def _default(config: Path, templates: Mapping[str, str]) -> str:
    if "default" not in templates:
        names = ", ".join(map(repr, templates)) or "none at all"
        raise ValueError(f"{config}: chat_template names {names}; one of its templates must be named 'default'")
    return templates["default"]


class _Sandbox(ImmutableSandboxedEnvironment):
    """Bounds what one product or power makes, as the sandbox bounds ranges; else ten characters fill the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        size, unit = _size_of_product(left, right) if operator == "*" else _size_of_power(left, right)
        if size > MAX_RANGE:
            raise OverflowError(f"{operator!r} makes {size} {unit}; at most {MAX_RANGE} are allowed")
        return super().call_binop(context, operator, left, right)


def _size_of_product(left: Any, right: Any) -> tuple[int, str]:
    """How much a product makes, and of what: integers grow, and sequences repeat from either side."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length(), "bits of an integer"
    count, repeated = (left, right) if isinstance(left, int) else (right, left)
    if isinstance(count, int) and isinstance(repeated, str | bytes | list | tuple):
        return len(repeated) * max(count, 0), "characters or items"
    return 0, ""


def _size_of_power(left: Any, right: Any) -> tuple[int, str]:
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * max(right, 0), "bits of an integer"
    return 0, ""  # floats overflow by themselves


def _environment() -> ImmutableSandboxedEnvironment:
    """The language that templates are written for: whitespace and functions as Hugging Face has them."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(value: object, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which a prompt is not.
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)

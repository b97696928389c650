"""The small files that stand beside a checkpoint's tokenizer, and the one check on text that enters."""

import json
import reprlib
from pathlib import Path
from typing import Any

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_OLDER, _NEWER = "special_tokens_map.json", "tokenizer_config.json"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one when the file is not there (all of them are optional)."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def special_tokens(folder: Path) -> dict[str, str]:
    """Special tokens by role: `{"bos_token": "<s>", ...}`.

    A token is written as its text or as an object with a `content`. `tokenizer_config.json` decides over
    the older `special_tokens_map.json`.

    Raises:
      ValueError: a token is written otherwise; the message names the file, the field and its value.
    """
    tokens = {
        role: _token(path, role, value)
        for path in (folder / _OLDER, folder / _NEWER)
        for role, value in read_json(path).items()
        if role.endswith("_token") and not role.startswith("add_")
    }
    return {role: token for role, token in tokens.items() if token is not None}


def special_token_file(folder: Path, role: str) -> Path:
    """The file that decides about one of the `special_tokens`."""
    return folder / (_NEWER if role in read_json(folder / _NEWER) else _OLDER)


def _token(path: Path, role: str, value: Any) -> str | None:
    """The text of a token; None where there is none, or where the field is a flag of some tokenizer's own."""
    if value is None or (isinstance(value, bool) and role not in _ROLES):
        return None
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        allowed = "a string, null, or an object whose content is a string"
        raise ValueError(f"{path}: {role} is {reprlib.repr(value)}; it must be {allowed}")
    return check_text(text, f"{path}: {role}")


def check_text(text: object, field: str) -> str:
    """`text` itself, when it is a string that UTF-8 can hold; else a ValueError that names `field`."""
    if not isinstance(text, str):
        raise ValueError(f"{field} must be a string, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X}"
        raise ValueError(
            f"{field} holds a lone surrogate, {found}, at position {error.start}: it must be valid Unicode"
        ) from error
    return text

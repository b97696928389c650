"""The small files that stand beside a checkpoint's tokenizer, and the one check on text that enters."""

import json
from pathlib import Path
from typing import Any


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
    """
    named = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    tokens = {
        role: value["content"] if isinstance(value, dict) else value
        for role, value in named.items()
        if role.endswith("_token") and not role.startswith("add_")
    }
    return {role: token for role, token in tokens.items() if isinstance(token, str)}


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

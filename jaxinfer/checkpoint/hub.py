"""Finds a model: a folder on this machine, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
_UNWANTED = ["*/*", "consolidated*"]  # the same weights once more, in their authors' own layout


def resolve(model: str | Path) -> Path:
    """The folder of a model's checkpoint, downloaded once where `model` is a Hugging Face id such as `org/name`.

    Raises:
        ValueError: `model` is neither a folder nor an id that can be downloaded; says why.
    """
    if not isinstance(model, str | Path) or not str(model):
        raise ValueError(f"model = {model!r} must be a folder or a Hugging Face id such as org/name")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if not _ID.fullmatch(str(model)):  # a path with a slip in it, for which no hub needs to be asked
        raise ValueError(f"model {str(model)!r} is no folder; expected one, or a Hugging Face id such as org/name")
    return _download(str(model))


def _download(model: str) -> Path:
    # A third of a second to import, which a folder need not wait for.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        message = f"model {model!r} is no folder, and not available from Hugging Face: {reason}"
        raise ValueError(message) from error

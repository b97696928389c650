"""Models by name: those of configs/models, those of Hugging Face, and those that only their paper describes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxinfer.model import ModelConfig

_PACKAGE = Path(__file__).parents[1]
# A wheel carries the configs inside the package.
MODELS = next(
    folder for folder in (_PACKAGE / "assets" / "models", _PACKAGE.parent / "configs" / "models") if folder.is_dir()
)


def find_model(model: str) -> ModelConfig:
    """The description of a model by folder, file, name in configs/models or Hugging Face id.

    Raises:
        ValueError: nothing of that name is found, or its config.json cannot be read; the message says why.
    """
    from huggingface_hub import hf_hub_download

    from jaxinfer.model import read_config

    if Path(model).exists():
        return read_config(Path(model))
    if (MODELS / model / "config.json").is_file():
        return read_config(MODELS / model)
    if model.count("/") != 1:
        names = ", ".join(sorted(folder.name for folder in MODELS.glob("*/")))
        raise ValueError(f"model is {model!r}; expected a folder, a file, a Hugging Face id or one of {names}")
    try:
        return read_config(hf_hub_download(model, "config.json"))
    except OSError as error:
        raise ValueError(f"no config.json of {model!r} from Hugging Face: {error}") from error

"""Models by name: those of configs/models, those of Hugging Face, and those that only their paper describes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxinfer.model import ModelConfig

_PACKAGE = Path(__file__).parents[1]


def shipped(name: str) -> Path:
    """A folder of `configs`, which a wheel carries inside the package."""
    folders = (_PACKAGE / "assets" / name, _PACKAGE.parent / "configs" / name)
    return next(folder for folder in folders if folder.is_dir())


MODELS = shipped("models")


# Query heads of PaLM 540B (Chowdhery et al. 2022, table 1), and as it was run on 64 devices: padded (Pope et al. 2022,
# "Efficiently Scaling Transformer Inference", section 4), so that each has one.
_PALM_HEADS = {"palm-540b": 48, "palm-540b-64-heads": 64}


def find_model(model: str) -> ModelConfig:
    """The description of a model by folder, file, name in configs/models or Hugging Face id; or of one that has no
    checkpoint, by its name.

    Raises:
        ValueError: nothing of that name is found, or its config.json cannot be read; the message says why.
    """
    from huggingface_hub import hf_hub_download

    from jaxinfer.model import read_config

    if Path(model).exists():
        return read_config(Path(model))
    if (MODELS / model / "config.json").is_file():
        return read_config(MODELS / model)
    if model in _PALM_HEADS:
        return _palm(_PALM_HEADS[model])
    if model.count("/") != 1:
        names = ", ".join([*sorted(folder.name for folder in MODELS.glob("*/")), *_PALM_HEADS])
        raise ValueError(f"model is {model!r}; expected a folder, a file, a Hugging Face id or one of {names}")
    try:
        return read_config(hf_hub_download(model, "config.json"))
    except OSError as error:
        raise ValueError(f"no config.json of {model!r} from Hugging Face: {error}") from error


def _palm(heads: int) -> ModelConfig:
    """PaLM 540B's shapes (Chowdhery et al. 2022, section 2): one KV head, attention and gated MLP in parallel, no
    biases, one table for embedding and head."""
    from jaxinfer.model.config import LayerConfig, ModelConfig
    from jaxinfer.model.rope import Rope

    return ModelConfig(
        architecture="PaLM",
        vocab_size=256_000,
        hidden_size=18_432,
        intermediate_size=73_728,
        num_heads=heads,
        num_kv_heads=1,
        head_size=256,
        layers=(LayerConfig(Rope(10_000.0, 256)),) * 118,
        context=2048,
        norm_eps=1e-6,
        norm="layer",
        parallel_block=True,
        tied_embeddings=True,
    )

"""Checkpoints: published ones and our own, from disk straight into sharded device arrays, and back."""

from pathlib import Path

import jax
import numpy as np

from jaxinfer.checkpoint import files, huggingface, native
from jaxinfer.checkpoint.hub import resolve
from jaxinfer.checkpoint.huggingface import export, published
from jaxinfer.checkpoint.native import convert, save
from jaxinfer.model import EagleHead, Model, Params, read_eagle_config

__all__ = ["convert", "export", "load", "load_head", "published", "resolve", "save", "tensors"]


def tensors(model: str | Path, file: str) -> dict[str, np.ndarray]:
    """The tensors of one safetensors file of a folder, or of a Hugging Face id, by name; read when they are used.

    Raises:
        ValueError: there is no such folder or file, or it is damaged.
    """
    return files.mapped(resolve(model) / file)


def load(folder: str | Path, model: Model) -> dict[str, jax.Array]:
    """The parameters of `model` by path, with its shapes, dtypes and shardings, from a checkpoint folder.

    The folder holds Hugging Face safetensors or our own checkpoint (`convert`). Neither needs a copy of the model
    on the host: parameters are read and assembled one group after the other, on the devices. Small tensors of
    safetensors files come through Orbax's layout of them; large ones are mapped and read by shard, since Orbax would
    hold each of them whole.

    Raises:
        ValueError: the checkpoint is damaged or is not one of this model. Names the file, the tensors, and the
            shapes expected and found; raised before a weight is read. Or a weight is NaN or infinite, which is known
            when all are read; names the file and the tensors.
    """
    folder = Path(folder)
    return native.load(folder, model) if native.is_native(folder) else huggingface.load(folder, model)


def load_head(folder: str | Path, target: Model) -> tuple[EagleHead, Params]:
    """The draft head in `folder`, in the published layout of EAGLE, for the model that it was made for.

    Raises:
        FileNotFoundError, ValueError: its `config.json` or its tensors are missing or malformed, see `load`; or it is
            of another vocabulary or hidden size than the model.
    """
    folder = Path(folder)
    config, names = read_eagle_config(folder), files.read_folder(folder).keys()
    for name in ("hidden_size", "vocab_size"):
        if (found := getattr(config, name)) != (expected := getattr(target.config, name)):
            raise ValueError(f"the head {folder} has {name} {found}; it must have the model's, {expected}")
    head = EagleHead(config, target, embeds="embed_tokens.weight" in names, bias="fc.bias" in names)
    return head, head.params(huggingface.load(folder, head))

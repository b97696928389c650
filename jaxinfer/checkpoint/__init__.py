"""Checkpoints: published ones and our own, from disk straight into sharded device arrays, and back."""

from pathlib import Path

import jax
import numpy as np

from jaxinfer.checkpoint import files, huggingface, native
from jaxinfer.checkpoint.hub import resolve
from jaxinfer.checkpoint.huggingface import export
from jaxinfer.checkpoint.native import convert, save
from jaxinfer.model import Model

__all__ = ["convert", "export", "load", "resolve", "save", "tensors"]


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

"""Checkpoints: published ones and our own, from disk straight into sharded device arrays, and back."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer.checkpoint import files, huggingface, native
from jaxinfer.checkpoint.hub import resolve
from jaxinfer.checkpoint.huggingface import export, published
from jaxinfer.checkpoint.native import convert, save
from jaxinfer.model import EagleHead, Model, Params, read_eagle_config

__all__ = [
    "convert", "export", "head_params", "load", "published", "read_head", "resolve", "save", "tensors",
]  # fmt: skip


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
    read = native.load if native.is_native(folder) else huggingface.load
    return model.joined(read(folder, model))


def read_head(folder: str | Path, target: Model) -> EagleHead:
    """The draft head in `folder`, in the published layout of EAGLE, for the model that it was made for; none of its
    weights.

    Raises:
        FileNotFoundError, ValueError: its `config.json` or its tensors are missing or malformed, see `load`; or it is
            of another vocabulary or hidden size than the model.
    """
    folder = Path(folder)
    config, tensors = read_eagle_config(folder), files.read_folder(folder)
    for name in ("hidden_size", "vocab_size"):
        if (found := getattr(config, name)) != (expected := getattr(target.config, name)):
            raise ValueError(f"the head {folder} has {name} {found}; it must have the model's, {expected}")
    return EagleHead(
        config, target, embeds="embed_tokens.weight" in tensors, bias="fc.bias" in tensors,
        tokens=_own_tokens(tensors, config.vocab_size), maps=_mapping(tensors, config.vocab_size) is not None,
    )  # fmt: skip


def head_params(folder: str | Path, head: EagleHead) -> Params:
    """The parameters of a head, on its devices, from the folder that it was read from.

    Raises:
        ValueError: as `load`.
    """
    folder = Path(folder)
    params = head.params(huggingface.load(folder, head))
    mapping_V = _mapping(files.read_folder(folder), head.config.vocab_size)
    return params if mapping_V is None else [*params, jax.device_put(mapping_V, NamedSharding(head.mesh, P()))]


def _own_tokens(tensors: Mapping[str, files.Tensor], vocab: int) -> int | None:
    """Those of the output matrix of a head of EAGLE-3, by default the model's; None of any other head."""
    if "midlayer.hidden_norm.weight" not in tensors:
        return None
    return vocab if (output := tensors.get("lm_head.weight")) is None else output.shape[0]


def _mapping(tensors: Mapping[str, files.Tensor], vocab: int) -> np.ndarray | None:
    """See `_token_map`; None for a head that has none."""
    tokens, d2t = _own_tokens(tensors, vocab), tensors.get("d2t")
    return None if d2t is None or tokens is None else _token_map(d2t, tokens, vocab)


def _token_map(d2t: files.Tensor, tokens: int, vocab: int) -> np.ndarray:
    """How far the id of each of a head's tokens is from its id in the model, int32.

    Raises:
        ValueError: the tensor is none of so many integers, or leads out of the vocabulary.
    """
    if d2t.shape != (tokens,) or d2t.dtype not in ("I64", "I32"):
        raise ValueError(
            f"{d2t.file}: tensor 'd2t' is {d2t.dtype} of shape {d2t.shape}; expected integers of shape ({tokens},)"
        )
    dtype = {"I64": np.int64, "I32": np.int32}[d2t.dtype]
    mapping_V = np.array(np.memmap(d2t.file, dtype, "r", d2t.offset, d2t.shape))
    ids_V = mapping_V + np.arange(tokens)
    if ids_V.min() < 0 or ids_V.max() >= vocab:
        raise ValueError(
            f"{d2t.file}: tensor 'd2t' leads to the tokens {ids_V.min()}..{ids_V.max()}; expected 0..{vocab - 1}"
        )
    return mapping_V.astype(np.int32)

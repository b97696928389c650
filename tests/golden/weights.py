"""Random weights that depend on a tensor's name, its shape and a seed alone, so that no weight is ever committed."""

import json
import math
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors.numpy import save_file

# Queries and keys are larger, so that attention is far from uniform, and the router, so that experts differ in weight.
# Embeddings are smaller and what layers add is larger: else a model with tied embeddings repeats its last token.
_GAINS: dict[str, float] = dict.fromkeys(("q_proj", "k_proj", "qkv_proj", "query_key_value"), 1.5)
_GAINS |= dict.fromkeys(("gate", "router"), 2.0)
_GAINS |= dict.fromkeys(("embed_tokens", "word_embeddings"), 0.5)
_GAINS |= dict.fromkeys(("o_proj", "down_proj", "w2", "dense", "dense_4h_to_h", "c_proj"), 2.0)


class Model(Protocol):
    """What `write_checkpoint` needs to know of a model; `load.Golden` has it."""

    @property
    def config(self) -> dict: ...
    @property
    def tensors(self) -> dict[str, tuple[int, ...]]: ...
    @property
    def seed(self) -> int: ...


def norm_centre(config: dict) -> float:
    """The value at which a stored norm weight does nothing: Gemma stores the weight less one."""
    return 0.0 if config["model_type"].startswith("gemma") else 1.0


def make_tensor(name: str, shape: tuple[int, ...], seed: int, norm_centre: float = 1.0) -> np.ndarray:
    """Float32 weights of the given shape for the tensor of that name on disk.

    Matrices have standard deviation gain / sqrt(fan in), so that activations keep unit size; norm weights lie around
    `norm_centre`. `RandomState` is frozen by NumPy's policy on legacy generators: its stream never changes.
    """
    random = np.random.RandomState(zlib.crc32(name.encode()) ^ seed)
    normal = random.standard_normal(shape)
    owner = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    if name.endswith("bias"):
        values = 0.2 * normal
    elif owner == "sinks":
        values = normal
    elif len(shape) == 1:
        values = norm_centre + 0.1 * normal
    else:
        # A stack of expert matrices is stored [expert, in, out], every other matrix [out, in].
        fan_in = shape[1] if len(shape) == 3 else shape[-1]
        values = _GAINS.get(owner, 1.0) / math.sqrt(fan_in) * normal
    return values.astype(np.float32)


def make_tensors(model: Model) -> dict[str, np.ndarray]:
    """Every tensor of the model by its name on disk."""
    centre = norm_centre(model.config)
    return {name: make_tensor(name, shape, model.seed, centre) for name, shape in model.tensors.items()}


def write_checkpoint(folder: Path, model: Model) -> None:
    """Write `config.json` and `model.safetensors` of the model into an existing folder, as published ones look."""
    (folder / "config.json").write_text(json.dumps(model.config, indent=2))
    save_file(make_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})

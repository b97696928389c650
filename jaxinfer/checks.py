"""What `LLM` is given, and a checkpoint says: refused before anything is loaded, by the name of the argument."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

import jax

from jaxinfer.decode.arguments import check_size, is_size
from jaxinfer.decode.sampling import MAX_EOS_IDS
from jaxinfer.engine import Options
from jaxinfer.engine.options import SMALLEST_BUCKET
from jaxinfer.model import ModelConfig
from jaxinfer.model.rope import Dynamic, LongRope, Yarn
from jaxinfer.text import Tokenizer


def check_arguments(
    dtype: str | None, max_model_len: int | None, seed: int, warm_up: bool, options: Options | None
) -> None:  # fmt: skip
    if dtype is not None and (not isinstance(dtype, str) or dtype not in ("bfloat16", "float16", "float32")):
        raise ValueError(f"dtype = {dtype!r} must be bfloat16, float16 or float32")
    if max_model_len is not None and not is_size(max_model_len, 2):
        raise ValueError(
            f"max_model_len = {max_model_len!r} must be an integer, at least 2 (a prompt and a new token)"
        )
    check_size("seed", seed, 0)
    if not isinstance(warm_up, bool):
        raise ValueError(f"warm_up = {warm_up!r} must be True or False")
    if not isinstance(options, Options | None):
        raise ValueError(f"options = {reprlib.repr(options)} must be an Options")


def facts(config: ModelConfig, options: Options, **given: Any) -> dict[str, str]:
    """What must be the same in all processes of a group, in words by name."""
    found = {f"the model's {name}": repr(value) for name, value in vars(config).items() if name != "layers"}
    found |= {f"the model's layer {index}": repr(layer) for index, layer in enumerate(config.layers)}
    found |= {name: repr(value) for name, value in vars(options).items()}
    return found | {name: repr(value) for name, value in given.items()}


def check_devices(**sizes: int) -> None:
    """The sizes of the mesh, by their names."""
    devices, product, others = len(jax.devices()), 1, []
    for name, size in sizes.items():
        if not is_size(size, 1, devices):
            raise ValueError(f"{name} = {size!r} must be an integer in 1..{devices}, the devices here")
        if product * size > devices:
            needed = f"{' and '.join(others)} needs {product * size} devices, and there are {devices}"
            raise ValueError(f"{name} = {size} with {needed}; it must be in 1..{devices // product}")
        product *= size
        others.append(f"{name} = {size}")
    context = sizes["context_parallel_size"]
    powers = [1 << shift for shift in range((SMALLEST_BUCKET // 2).bit_length())]  # a step has two blocks of rows each
    if context not in powers:
        raise ValueError(f"context_parallel_size = {context} must be a power of two in 1..{powers[-1]}")
    if context > 1 and (stages := sizes["pipeline_parallel_size"]) > 1:
        refused = f"context_parallel_size = {context} does not go with pipeline_parallel_size = {stages}"
        raise ValueError(f"{refused}; one of them must be 1")


def check_context(max_model_len: int | None, config: ModelConfig) -> None:
    """Refuses positions that the model was not made for, unless its rotary embeddings adapt to the context."""
    scalings = {layer.rope.scaling for layer in config.layers}
    if max_model_len is None or any(isinstance(scaling, Dynamic | LongRope) for scaling in scalings):
        return
    # Published YaRN configs state the context before its extension.
    extended = [int(scaling.original_context * scaling.factor) for scaling in scalings if isinstance(scaling, Yarn)]
    longest = max(config.context, *extended, 0)
    if max_model_len > longest:
        raise ValueError(f"max_model_len = {max_model_len} must be in 2..{longest}, the checkpoint's context")


def checked_eos(folder: Path, tokenizer: Tokenizer, vocab: int) -> tuple[int, ...]:
    ids = sorted(tokenizer.eos_ids)
    if len(ids) > MAX_EOS_IDS:
        raise ValueError(f"{folder}: eos_token_id has {len(ids)} token ids; at most {MAX_EOS_IDS} are allowed")
    if ids and ids[-1] >= vocab:
        raise ValueError(f"{folder}: eos_token_id has token id {ids[-1]}; each must be in 0..{vocab - 1}")
    return tuple(ids)

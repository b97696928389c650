"""Published checkpoints: Hugging Face safetensors in, straight into sharded device arrays, and out again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file

from jaxinfer.checkpoint import loading, names
from jaxinfer.checkpoint.assembly import Assembly
from jaxinfer.checkpoint.files import INDEX, SINGLE, Tensor, read_folder
from jaxinfer.checkpoint.loading import IN_FLIGHT, Planned
from jaxinfer.checkpoint.staging import staged
from jaxinfer.model import Network

# Bytes beyond which a tensor is read shard by shard. Orbax holds every shard of a tensor on the host besides the
# arrays; with a 500 MB model of two 200 MB embeddings on 8 devices that was 280 MB at the peak, this way 130.
_LARGE = 64 << 20
_CHUNK = 4 << 20  # bytes of one read; IN_FLIGHT bounds how many run at once


def load(folder: Path, model: Network, stored_dtypes: bool = False) -> dict[str, jax.Array]:
    """The parameters of `model` as it has them stored, by path, from the safetensors checkpoint in `folder`.

    Raises:
        ValueError: the checkpoint is damaged or is not one of this model; see `files.read_folder` and
            `loading.plan`; no weight has been read by then. Or a weight is not finite; see `loading.load`.
    """
    config = model.config
    found = {
        names.plain_name(config, name): tensor
        for name, tensor in read_folder(folder).items()
        if not names.ignorable(config, name)
    }
    planned = loading.plan(folder, found, names.rules(config, model.stored), model, stored_dtypes)
    return loading.load(planned, _read)


def _read(group: list[Planned]) -> dict[str, jax.Array]:
    by_file: dict[Path, dict[str, jax.ShapeDtypeStruct]] = {}
    tensors: dict[str, jax.Array] = {}
    for tensor, leaf in (pair for parameter in group for pair in parameter.wanted()):
        if tensor.size > _LARGE or jax.process_count() > 1:  # each process reads its own shards
            tensors[tensor.name] = _read_by_shard(tensor, leaf)
        else:
            by_file.setdefault(tensor.file, {})[tensor.name] = leaf
    context = ocp.Context()
    context.checkpoint_layout = ocp.options.CheckpointLayout.SAFETENSORS
    context.memory.read_concurrent_bytes = IN_FLIGHT
    context.safetensors.read_chunk_bytes = _CHUNK
    with context:
        for file, leaves in by_file.items():
            tensors |= ocp.load(str(file), leaves)
    return tensors


def _read_by_shard(tensor: Tensor, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """One device's part after the other, where Orbax would hold all of a tensor on the host besides."""
    arrays = []
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        stored = np.memmap(tensor.file, leaf.dtype, "r", tensor.offset, leaf.shape)
        arrays.append(jax.device_put(stored[index], device, may_alias=False))
        arrays[-1].block_until_ready()
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays, dtype=leaf.dtype)


def export(
    folder: Path, model: Network, arrays: Mapping[str, jax.Array], files: Mapping[str, str], shard_bytes: int
) -> None:
    """Writes parameters as a Hugging Face checkpoint; `load` gives them back bit for bit.

    Args:
        folder: must not exist; it appears when all is written.
        arrays: the parameters of `model` by path.
        files: text of the files that stand beside the weights, by name, such as `config.json`.
        shard_bytes: weights of one file at most, unless a single tensor is larger.

    Raises:
        ValueError: `folder` exists, or `shard_bytes` is not positive.
        OSError: the disk is full; nothing is left behind.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}; it must be at least 1")
    with staged(folder, sum(array.nbytes for array in arrays.values())) as staging:
        for name, text in files.items():
            (staging / name).write_text(text, encoding="utf-8")
        _write_shards(staging, published(model, arrays), shard_bytes)


def published(model: Network, arrays: Mapping[str, jax.Array | np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The published tensors of every parameter, one parameter at a time on the host."""
    rules = names.rules(model.config, model.stored)
    for path, array in model.parted(arrays):
        assembly = Assembly.of(model.config, path, rules[path].form, model.stored[path])
        tensors = assembly.split(np.asarray(array))
        yield from zip(rules[path].names, map(np.ascontiguousarray, tensors), strict=True)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int) -> None:
    """Fills one file after the other; they are named when their number is known."""
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def write() -> None:
        save_file(held, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and sum(other.nbytes for other in held.values()) + tensor.nbytes > shard_bytes:
            write()
        held[name] = tensor
        total += tensor.nbytes
    write()
    _name_shards(folder, shards, total)


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    if len(shards) == 1:
        (folder / "0.part").rename(folder / SINGLE)
        return
    weight_map = {}
    for index, held in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{index}.part").rename(folder / file)
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")

"""Our own checkpoint: the parameters as the model holds them, in an Orbax store that any mesh restores.

    folder/config.json, tokenizer.json, ...   as published
    folder/parameters/                        an Orbax v1 checkpoint: a flat tree, by the parameters' paths
    folder/parameters.json                    the size in bytes of every file of it

Every KV head is stored once, whatever the mesh that saved it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from jaxinfer.checkpoint import forms, huggingface, loading, slots
from jaxinfer.checkpoint.files import DTYPES, INDEX, Tensor, parse_object
from jaxinfer.checkpoint.loading import IN_FLIGHT, Planned
from jaxinfer.checkpoint.names import Rule
from jaxinfer.checkpoint.staging import staged
from jaxinfer.model import Model, read_config

PARAMETERS, SIZES = "parameters", "parameters.json"
_CHUNK = 8 << 20  # bytes of one stored chunk: a shard reads little more than itself
_BESIDE = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE")  # config, tokenizer, chat template, licence


def convert(source: Path, destination: Path, mesh: Mesh) -> None:
    """Writes the Hugging Face checkpoint in `source` as our own in `destination`, in the dtypes that it has.

    Loading `destination` then gives the same bits as loading `source`, on any mesh and in any dtype.

    Raises:
        ValueError: `source` cannot be loaded or is our own already, or `destination` exists.
        OSError: the disk is full; nothing is left behind.
    """
    if destination.exists():
        raise ValueError(f"{destination} exists; checkpoints are written to a new folder")
    if is_native(source):
        raise ValueError(f"{source} is in our own layout already; expected the folder of a Hugging Face checkpoint")
    model = Model(read_config(source), mesh)
    save(destination, model, model.joined(huggingface.load(source, model, stored_dtypes=True)), source)


def save(folder: Path, model: Model, arrays: Mapping[str, jax.Array], beside: Path) -> None:
    """Writes the parameters of `model` to a new `folder`, with config and tokenizer from the folder `beside`.

    Raises:
        ValueError: `folder` exists.
        OSError: the disk is full or a write failed; nothing is left behind.
    """
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = _CHUNK
    context.memory.transfer_concurrent_bytes = IN_FLIGHT
    with staged(folder, sum(array.nbytes for array in arrays.values())) as staging:
        for pattern in _BESIDE:
            for file in beside.glob(pattern):
                if file.name not in (INDEX, SIZES):
                    shutil.copyfile(file, staging / file.name)
        with context:
            ocp.save(
                _orbax_path(staging / PARAMETERS),
                {path: _stored(model, path, array) for path, array in model.parted(arrays)},
            )
        (staging / SIZES).write_text(json.dumps(_sizes(staging / PARAMETERS), indent=2), encoding="utf-8")


def _orbax_path(store: Path) -> str:
    """Orbax takes no relative path; what else names the store names it as the caller did."""
    return str(store.resolve())


def _stored(model: Model, path: str, array: jax.Array) -> jax.Array | np.ndarray:
    repeats = slots.repeats(path, array.shape, model.config.num_kv_heads)
    return array if repeats == 1 else np.asarray(slots.gather(path, jnp.asarray(np.asarray(array)), repeats))


def _sizes(store: Path) -> dict[str, int]:
    """Bytes of every file of a store, by its path within."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {path.relative_to(store).as_posix(): path.stat().st_size for path in files}


def is_native(folder: Path) -> bool:
    return (folder / PARAMETERS).is_dir()


def load(folder: Path, model: Model) -> dict[str, jax.Array]:
    """The parameters of `model` as it has them stored, by path, from our own checkpoint in `folder`.

    Raises:
        ValueError: the checkpoint is damaged or is not one of this model; see `loading.plan` and
            `loading.load`.
    """
    _check_sizes(folder)
    rules = {path: Rule(forms.SAME, (path,)) for path in model.stored}
    planned = loading.plan(folder, _read_metadata(folder / PARAMETERS), rules, model, stored_dtypes=False)
    return loading.load(planned, _read)


def _check_sizes(folder: Path) -> None:
    """Finds files that are missing or cut short before Orbax meets them in the middle of reading."""
    found = _sizes(folder / PARAMETERS)
    for name, size in parse_object(folder / SIZES).items():
        if found.get(name) != size:
            has = f"has {found[name]} bytes" if name in found else "is missing"
            raise ValueError(f"{folder / PARAMETERS / name} {has}; expected {size} bytes")


def _read_metadata(store: Path) -> dict[str, Tensor]:
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    with _readable(store):
        leaves = ocp.metadata(_orbax_path(store)).metadata
    if not isinstance(leaves, dict):
        raise ValueError(f"{store} cannot be read: its metadata is damaged")
    return {
        path: Tensor(store, path, tuple(leaf.shape), kinds.get(leaf.dtype, str(leaf.dtype)))
        for path, leaf in leaves.items()
    }


def _read(group: list[Planned]) -> dict[str, jax.Array]:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    wanted = [pair for parameter in group for pair in parameter.wanted()]
    store = wanted[0][0].file
    with context, _readable(store):
        return ocp.load(_orbax_path(store), {tensor.name: leaf for tensor, leaf in wanted})


@contextmanager
def _readable(store: Path) -> Iterator[None]:
    """Names the store in whatever Orbax raises about damaged bytes; some of it is a bare `Exception`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{store} cannot be read: {error}") from error

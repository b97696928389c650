"""The safetensors files of a folder, known by their headers alone: nothing here reads a weight.

A safetensors file is eight bytes of header length, a JSON header that gives dtype, shape and byte range of every
tensor, then the bytes (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The dtypes that weights may have. Integers and 8-bit floats belong to quantized checkpoints.
DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
_PREFIX = 8  # bytes that hold the header's length
_HEADER_LIMIT = 100_000_000  # bytes, the format's own limit


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file, or in a folder that is a store; `dtype` is the format's name of it.

    `offset` is the byte of the file at which the tensor begins.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0

    @property
    def size(self) -> int:
        """Bytes, of a dtype that weights may have."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint in `folder`, by name.

    Raises:
        ValueError: names the file, and the tensor where there is one, that is missing, truncated or malformed.
    """
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}")
    weight_map = _read_index(folder / INDEX)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        for name, tensor in read_header(folder / file).items():
            if name in tensors:
                raise ValueError(f"tensor {name!r} stands in two files: {tensors[name].file} and {tensor.file}")
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise ValueError(f"{folder / file} lacks the tensor {name!r} that {INDEX} places there")
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    index = parse_object(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: weight_map is {weight_map!r}; expected an object of file names by tensor name")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{path}: tensor {name!r} is placed in {file!r}; expected a file of the same folder")
        if not (path.parent / file).is_file():
            raise ValueError(f"{path.parent / file} is missing; {path.name} places tensor {name!r} there")
    return weight_map


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors that one file declares, found to fill all of it that follows the header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_PREFIX), "little")
        if size < _PREFIX or length > min(size - _PREFIX, _HEADER_LIMIT):
            raise ValueError(f"{path} is truncated or corrupt: it declares a header of {length} bytes, has {size}")
        header = _parse(path, file.read(length))
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    tensors = {name: _tensor(path, name, entry, _PREFIX + length, size) for name, entry in entries.items()}
    _check_order(path, entries, _PREFIX + length, size)
    return tensors


def mapped(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one file, by name; a part of one is read when it is used.

    Raises:
        ValueError: the file is missing, damaged, or has a tensor that is no weight.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    tensors = read_header(path)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{path}: tensor {name!r} is {tensor.dtype}; expected one of {', '.join(DTYPES)}")
    return {name: np.memmap(path, DTYPES[one.dtype], "r", one.offset, one.shape) for name, one in tensors.items()}


def parse_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    return _parse(path, path.read_bytes())


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is corrupt: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{path} is corrupt: it holds {type(parsed).__name__}; expected a JSON object")
    return parsed


def _tensor(path: Path, name: str, entry: Any, data: int, size: int) -> Tensor:
    """A header's entry, checked against the file: `data` is the byte after the header, `size` the file's own."""
    if not _well_formed(entry):
        raise ValueError(f"{path} is corrupt: tensor {name!r} is declared as {entry!r}")
    begin, end = entry["data_offsets"]
    tensor = Tensor(path, name, tuple(entry["shape"]), entry["dtype"], data + begin)
    described = f"tensor {name!r}, {tensor.dtype} of shape {tensor.shape},"
    if tensor.dtype in DTYPES and end - begin != tensor.size:
        raise ValueError(f"{path} is corrupt: {described} takes {tensor.size} bytes; its place has {end - begin}")
    if data + end > size:
        raise ValueError(f"{path} is truncated: {described} ends at byte {data + end}; the file has {size}")
    return tensor


def _check_order(path: Path, entries: dict[str, Any], data: int, size: int) -> None:
    """Finds tensors that overlap and bytes that belong to none: the format allows neither."""
    places = sorted((*entry["data_offsets"], f"tensor {name!r}") for name, entry in entries.items())
    end, before = 0, "the header"
    for begin, until, what in [*places, (size - data, size - data, "the end of the file")]:
        if begin != end:
            raise ValueError(f"{path} is corrupt: {what} is at byte {data + begin}; {before} ends at {data + end}")
        end, before = until, what


def _well_formed(entry: Any) -> bool:
    """Whether it is an object with a dtype, a shape, and a range of bytes."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, place = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(place, list) or len(place) != 2:
        return False
    return all(type(count) is int and count >= 0 for count in (*shape, *place)) and place[0] <= place[1]

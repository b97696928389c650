"""Configs that `python -m benchmarks.kernels --tune` found to be the fastest, as data beside each op's `config.py`.

A file is a list of entries: the kind of device, the key under which the op looks a problem up, the fields of the
config that are not its defaults (or the name of another implementation, which is faster), and the us of a call, null
where the entry stands between measured ones.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import jax

# Devices whose entries stand in where one has none for a key: that of the first of them that has one.
NEAREST = ("NVIDIA H200", "NVIDIA H100 80GB HBM3")
Found = dict[str, Any] | str


def find(path: Path, key: str) -> Found | None:
    """What the file says for this device: fields of a config, or the name of an implementation."""
    entries = read(path)
    found = (entries.get((device, key)) for device in (jax.devices()[0].device_kind, *NEAREST))
    return next((entry["config"] for entry in found if entry is not None), None)


@functools.cache
def read(path: Path) -> Mapping[tuple[str, str], dict[str, Any]]:
    """The entries by device and key; read once, as a program is traced with them."""
    entries = json.loads(path.read_text()) if path.exists() else []
    return {(entry["device"], entry["key"]): entry for entry in entries}


def save(path: Path, device: str, key: str, config: Any, seconds: float) -> None:
    """Writes an entry in the place of that of the same device and key."""
    entry = {"device": device, "key": key, "config": _fields(config), "us": round(seconds * 1e6, 2)}
    read.cache_clear()
    entries = {**read(path), (device, key): entry}
    lines = ",\n".join(f" {json.dumps(entries[name])}" for name in sorted(entries))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{lines}\n]\n")
    read.cache_clear()


def _fields(config: Any) -> Found:
    if isinstance(config, str):
        return config
    named = {field.name: (getattr(config, field.name), field.default) for field in fields(config)}
    return {name: value for name, (value, default) in named.items() if default is MISSING or value != default}

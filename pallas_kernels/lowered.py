"""Kernels that are lowered once, whatever programs they are in.

Mosaic GPU lowers a kernel in Python, in half a second to a second, again in every program. An engine's programs have
many kernels in common. What is lowered here is a module of its own, which programs take in as it is. Where JAX keeps
compiled programs for later processes, in the folder `jax_compilation_cache_dir`, it keeps these too.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax import export

_CHECKS = (export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2"),)
_lowered: dict[Hashable, export.Exported] = {}
logger = logging.getLogger(__name__)


def once(kernel: Callable[..., Any], key: Hashable, *arguments: Any) -> list[jax.Array]:
    """`kernel(*arguments)`, its results in a list, lowered once for all calls of equal keys with arguments of equal
    shapes.

    Args:
        key: all that the kernel does depends on it and the arguments' shapes alone; so does its `repr`.
    """
    if not _on_gpu():
        return jax.tree.leaves(kernel(*arguments))
    leaves, tree = jax.tree.flatten(arguments)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    full = key, tree, shapes
    if full not in _lowered:
        flat = lambda *leaves: jax.tree.leaves(kernel(*jax.tree.unflatten(tree, leaves)))  # noqa: E731
        exporting = export.export(jax.jit(flat), platforms=("cuda",), disabled_checks=_CHECKS)
        # In a thread, which is outside of any mesh: what is lowered for one device alone runs on any number.
        with ThreadPoolExecutor(1) as alone:
            _lowered[full] = alone.submit(_kept, repr(full), lambda: exporting(*shapes)).result()
    return [*_lowered[full].call(*leaves)]


def _kept(name: str, lower: Callable[[], export.Exported]) -> export.Exported:
    """From its file where there is one; else lowered, and written to it."""
    if (folder := _folder()) is None:
        return lower()
    path = folder / hashlib.sha256(f"{_made_by()} {name}".encode()).hexdigest()
    if path.exists():
        try:
            return export.deserialize(bytearray(path.read_bytes()))
        except Exception as error:  # of whatever kind: it is lowered again
            logger.warning("the kernel in %s cannot be read: %r", path, error)
    made = lower()
    try:
        _write(path, made.serialize())
    except OSError as error:
        logger.warning("the kernel is not kept in %s: %s", path, error)
    return made


def _folder() -> Path | None:
    """Where kernels are kept; None where they are not."""
    cache = jax.config.jax_compilation_cache_dir
    if cache is None or not jax.config.jax_enable_compilation_cache or "://" in cache:
        return None
    if importlib.util.find_spec("flatbuffers") is None:
        _say_what_is_missing()
        return None
    return Path(cache) / "kernels"


@functools.cache
def _say_what_is_missing() -> None:
    logger.info("lowered kernels are not kept: that needs the package flatbuffers, of the extra cuda")


@functools.cache
def _made_by() -> str:
    """The versions of all that lowers a kernel: those of JAX, and our own source text."""
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    device = jax.devices()[0].device_kind
    return f"jax {jax.__version__}, jaxlib {metadata.version('jaxlib')}, {device}, {source.hexdigest()}"


def _write(path: Path, content: bytes | bytearray) -> None:
    """All at once: another process reads all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


def _on_gpu() -> bool:
    """Elsewhere a kernel is interpreted, or lowered to be looked at."""
    return jax.default_backend() == "gpu"

"""Kernels that are lowered once in a process, whatever programs they are in.

Mosaic GPU lowers a kernel in Python, in half a second to a second, again in every program. An engine's programs have
many kernels in common. What is lowered here is a module of its own, which programs take in as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax import export

_CHECKS = (export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2"),)
_lowered: dict[Hashable, export.Exported] = {}


def once(kernel: Callable[..., Any], key: Hashable, *arguments: Any) -> Any:
    """`kernel(*arguments)`, lowered once for all calls of equal keys with arguments of equal shapes.

    Args:
        key: all that the kernel does depends on it and the arguments' shapes alone.
    """
    if not _on_gpu():
        return kernel(*arguments)
    leaves, tree = jax.tree.flatten(arguments)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    full = key, tree, shapes
    if full not in _lowered:
        exporting = export.export(jax.jit(kernel), platforms=("cuda",), disabled_checks=_CHECKS)
        _lowered[full] = exporting(*jax.tree.unflatten(tree, shapes))
    return _lowered[full].call(*arguments)


def _on_gpu() -> bool:
    """Elsewhere a kernel is interpreted, or lowered to be looked at."""
    return jax.default_backend() == "gpu"

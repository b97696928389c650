"""The one mesh. Its axes are explicit: an array carries its sharding in its type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

PIPE, TENSOR, CONTEXT = "pipe", "tensor", "context"


def make_mesh(tensor: int = 1, pipe: int = 1, devices: Sequence[Any] | None = None, context: int = 1) -> Mesh:
    """A mesh of pipe x tensor x context devices, the first ones of `devices` (by default of all, equally many of each
    process).

    Raises:
        ValueError: an axis is smaller than 1, or the mesh needs more devices than there are.
    """
    axes = {PIPE: pipe, TENSOR: tensor, CONTEXT: context}
    for name, size in axes.items():
        if size < 1:
            raise ValueError(f"mesh axis {name} has size {size}; it must be at least 1")
    needed = math.prod(axes.values())
    devices = list(_shared(needed) if devices is None else devices)
    if needed > len(devices):
        sizes = " x ".join(f"{name}={size}" for name, size in axes.items())
        raise ValueError(f"mesh {sizes} needs {needed} devices; there are {len(devices)}")
    grid = np.asarray(devices[:needed]).reshape(*axes.values())
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Explicit,) * len(axes))


def _shared(count: int) -> list[Any]:
    """All devices of the only process; of several `count`, equally many of each, one process after the other.

    Raises:
        ValueError: they have not as many.
    """
    devices, processes = jax.devices(), jax.process_count()
    if processes == 1:
        return devices
    each = [[device for device in devices if device.process_index == process] for process in range(processes)]
    most = min(map(len, each))
    if count % processes or count > most * processes:
        fits = ", ".join(str(processes * some) for some in range(1, most + 1))
        raise ValueError(
            f"a mesh of {count} devices cannot have equally many of each of {processes} processes, which have "
            f"{', '.join(str(len(own)) for own in each)} devices; so many could be: {fits}"
        )
    return [device for own in each for device in own[: count // processes]]

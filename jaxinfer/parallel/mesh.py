"""The one mesh. Its axes are explicit: an array carries its sharding in its type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

PIPE, TENSOR = "pipe", "tensor"


def make_mesh(tensor: int = 1, pipe: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of pipe x tensor devices, the first ones of `devices` (by default of all, equally many of each process).

    Raises:
        ValueError: an axis is smaller than 1, or the mesh needs more devices than there are.
    """
    for name, size in ((PIPE, pipe), (TENSOR, tensor)):
        if size < 1:
            raise ValueError(f"mesh axis {name} has size {size}; it must be at least 1")
    devices = list(_shared(pipe * tensor) if devices is None else devices)
    if pipe * tensor > len(devices):
        raise ValueError(
            f"mesh {PIPE}={pipe} x {TENSOR}={tensor} needs {pipe * tensor} devices; there are {len(devices)}"
        )
    grid = np.asarray(devices[: pipe * tensor]).reshape(pipe, tensor)
    return Mesh(grid, (PIPE, TENSOR), axis_types=(AxisType.Explicit,) * 2)


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

"""The one mesh. Its axes are explicit: an array carries its sharding in its type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

PIPE, TENSOR = "pipe", "tensor"


def make_mesh(tensor: int = 1, pipe: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of pipe x tensor devices, the first ones of `devices` (all local devices by default).

    Raises:
        ValueError: an axis is smaller than 1, or the mesh needs more devices than there are.
    """
    for name, size in ((PIPE, pipe), (TENSOR, tensor)):
        if size < 1:
            raise ValueError(f"mesh axis {name} has size {size}; it must be at least 1")
    devices = list(jax.devices() if devices is None else devices)
    if pipe * tensor > len(devices):
        raise ValueError(
            f"mesh {PIPE}={pipe} x {TENSOR}={tensor} needs {pipe * tensor} devices; there are {len(devices)}"
        )
    grid = np.asarray(devices[: pipe * tensor]).reshape(pipe, tensor)
    return Mesh(grid, (PIPE, TENSOR), axis_types=(AxisType.Explicit,) * 2)

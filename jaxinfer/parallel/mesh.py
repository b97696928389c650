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
    """A mesh of pipe x tensor x context devices, the first ones of `devices` (all local devices by default).

    Raises:
        ValueError: an axis is smaller than 1, or the mesh needs more devices than there are.
    """
    axes = {PIPE: pipe, TENSOR: tensor, CONTEXT: context}
    for name, size in axes.items():
        if size < 1:
            raise ValueError(f"mesh axis {name} has size {size}; it must be at least 1")
    devices = list(jax.devices() if devices is None else devices)
    if (needed := math.prod(axes.values())) > len(devices):
        sizes = " x ".join(f"{name}={size}" for name, size in axes.items())
        raise ValueError(f"mesh {sizes} needs {needed} devices; there are {len(devices)}")
    grid = np.asarray(devices[:needed]).reshape(*axes.values())
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Explicit,) * len(axes))

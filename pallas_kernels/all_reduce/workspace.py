"""The memory in which devices meet: it outlives every launch, since a device may be a launch ahead of another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.checks import require

TURNS = 2  # places for every message: a device that is a launch ahead writes to the other one


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Workspace:
    """What one device holds of it, inside a `shard_map`; outside, first axes are those of all devices.

    A launch leaves it as the next one needs it, on every device the same: no count, and each row's turn, 0 or 1.

    Attributes:
        inbox: messages, by row of the launch, turn, and the device that they are from: [rows, 2, devices, D].
        counts: int32 [rows, devices + 1]: by row, messages of each device that are there and not taken, and the turn.
    """

    inbox: jax.Array
    counts: jax.Array

    @property
    def rows(self) -> int:
        return self.inbox.shape[0]


def new_workspace(mesh: Mesh, axis: str, rows: int, hidden: int, dtype: Any) -> Workspace:
    """A workspace for the devices of a mesh axis, for messages of up to `rows` times `hidden` numbers of a dtype.

    It goes to `shard_map` as any array does, with the spec `P(axis)`, and with it to a jitted program as an argument
    that is not donated. Kernels write to it behind XLA's back: so it must not be read, copied or given to two programs
    that run at the same time, and after a program that failed it is worthless: make another.

    Raises:
        ValueError: there is no such axis, or its devices cannot reach each other's memory as the kernel does.
    """
    require(
        axis in mesh.axis_names, "axis", repr(axis), f"an axis of the mesh: {', '.join(map(str, mesh.axis_names))}"
    )
    require(rows >= 1, "rows", rows, "at least 1")
    require(hidden >= 1, "hidden", hidden, "at least 1")
    ids = [device.id for device in mesh.devices.flat]
    require(ids == [*range(len(ids))], "mesh.devices", f"those with ids {ids}", "the first ones in order, 0, 1, ...")
    devices = mesh.shape[axis]
    zeros = partial(jnp.zeros, device=NamedSharding(mesh, P(axis)))
    inbox = zeros((devices * rows, TURNS, devices, hidden), jnp.dtype(dtype))
    return Workspace(inbox, zeros((devices * rows, devices + 1), jnp.int32))

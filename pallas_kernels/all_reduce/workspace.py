"""The memory in which devices meet: it outlives a launch, since a device may be a launch ahead of another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
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
    """A workspace for the devices of a mesh axis that lasts, for messages of up to `rows` times `hidden` numbers.

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
    require(in_order(mesh), "mesh.devices", f"those with ids {ids}", "the first ones in order, 0, 1, ...")
    inbox, counts = _shapes(rows, mesh.shape[axis], hidden, dtype)
    zeros = partial(jnp.zeros, device=NamedSharding(mesh, P(axis)))
    devices = mesh.shape[axis]
    return Workspace(
        zeros((devices * rows, *inbox.shape[1:]), inbox.dtype),
        zeros((devices * rows, *counts.shape[1:]), counts.dtype),
    )


def in_order(mesh: Mesh) -> bool:
    """Whether the mesh holds the first devices in their order, as Mosaic GPU takes it to."""
    return [device.id for device in mesh.devices.flat] == [*range(mesh.size)]


def fresh_workspace(axis: str, rows: int, hidden: int, dtype: Any) -> Workspace:
    """The part of this device of a workspace for the rest of a program; called inside a `shard_map`, on a GPU.

    At its first use all devices must meet. It comes of a kernel: were it zeros to XLA, others that need zeros of the
    same shape could be given the same memory.
    """
    inbox, counts = _shapes(rows, lax.axis_size(axis), hidden, dtype)

    def body(_, counts_ref):
        for column in range(counts.shape[1]):
            counts_ref[lax.axis_index("row"), column] = jnp.int32(0)

    make = plgpu.kernel(
        body, out_type=(inbox, counts), grid=(rows,), grid_names=("row",), kernel_name="all_reduce_workspace"
    )
    return Workspace(*make())


def _shapes(rows: int, devices: int, hidden: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Of inbox and counts on one device."""
    inbox = jax.ShapeDtypeStruct((rows, TURNS, devices, hidden), jnp.dtype(dtype))
    return inbox, jax.ShapeDtypeStruct((rows, devices + 1), jnp.dtype(jnp.int32))

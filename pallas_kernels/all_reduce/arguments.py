"""What `all_reduce` is asked: its arrays and static options as one pytree, and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
from jax import lax

from pallas_kernels.all_reduce.workspace import Workspace
from pallas_kernels.checks import COMPUTE_DTYPES, require, require_array, require_number


class Reduced(NamedTuple):
    """The sum with its residual, and the norm of that where one was asked for."""

    out_TD: jax.Array
    normed_TD: jax.Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arguments:
    partial_TD: jax.Array
    residual_TD: jax.Array | None
    norm_scale_D: jax.Array | None
    workspace: Workspace | None
    axis: str = field(metadata={"static": True})
    norm_eps: float = field(metadata={"static": True})
    meets: bool = field(metadata={"static": True})

    @property
    def devices(self) -> int:
        return lax.axis_size(self.axis)

    @property
    def message_bytes(self) -> int:
        """That each device tells every other."""
        return self.partial_TD.size * self.partial_TD.dtype.itemsize


def check(arguments: Arguments) -> None:
    """Raises ValueError for what no implementation takes."""
    partial_TD, eps = arguments.partial_TD, arguments.norm_eps
    require_array("partial", partial_TD)
    require(partial_TD.ndim == 2, "partial.shape", partial_TD.shape, "the axes TD")
    require(min(partial_TD.shape) >= 1, "partial.shape", partial_TD.shape, "every one of the axes TD at least 1")
    _require_dtype("partial", partial_TD)
    _check_axis(arguments.axis)
    _check_like("residual", arguments.residual_TD, partial_TD.shape)
    _check_like("norm_scale", arguments.norm_scale_D, partial_TD.shape[1:])
    require_number("norm_eps", eps, lambda eps: 0 <= eps < math.inf, "a finite number, at least 0")
    _check_workspace(arguments)


def _check_axis(axis: object) -> None:
    allowed = "a mesh axis over which a shard_map around the call is manual"
    require(isinstance(axis, str), "axis", repr(axis), allowed)
    try:
        lax.axis_size(axis)
    except NameError:
        raise ValueError(f"axis is {axis!r}; allowed: {allowed}") from None


def _check_like(name: str, array: jax.Array | None, shape: tuple[int, ...]) -> None:
    if array is not None:
        require_array(name, array)
        require(array.shape == shape, f"{name}.shape", array.shape, f"{shape}, as partial")
        _require_dtype(name, array)


def _check_workspace(arguments: Arguments) -> None:
    workspace, partial_TD = arguments.workspace, arguments.partial_TD
    if workspace is None:
        return
    found = f"a {type(workspace).__name__}"
    require(isinstance(workspace, Workspace), "workspace", found, "None or what `new_workspace` made")
    inbox, hidden, devices = workspace.inbox, partial_TD.shape[1], arguments.devices
    require(inbox.shape[2:] == (devices, hidden), "workspace.inbox.shape", inbox.shape,
            f"messages of {hidden} numbers from {devices} devices")  # fmt: skip
    require(inbox.dtype == partial_TD.dtype, "workspace.inbox.dtype", inbox.dtype, f"{partial_TD.dtype}, as partial")


def _require_dtype(name: str, array: jax.Array) -> None:
    require(array.dtype.name in COMPUTE_DTYPES, f"{name}.dtype", array.dtype, ", ".join(COMPUTE_DTYPES))

"""The helpers in which the model meets several devices. Everything else of it is plain jax.numpy.

Each is a `shard_map` over the axis `tensor`: what a device computes is an ordinary function of local arrays, and the
sum over devices stands here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxinfer.parallel.context import row_axis
from jaxinfer.parallel.mesh import TENSOR


def attend(local: Callable[..., Any], specs: tuple[Any, ...], out_specs: Any, *arguments: Any) -> Any:
    """Runs `local` on every device's own heads.

    Args:
        local: a function of local arrays that calls the page-write and attention kernels.
        specs: a `PartitionSpec`, or a pytree prefix of them, for each argument.
        out_specs: the same for the result.
        arguments: arrays and pytrees of arrays.
    """
    # Varying-axes checks are off: they do not know the kernels' calls.
    mapped = jax.shard_map(local, in_specs=specs, out_specs=out_specs, check_vma=False)
    return mapped(*arguments)


def column_parallel(local: Callable[..., jax.Array], out_spec: P, columns: Any, *replicated: Any) -> jax.Array:
    """`local(columns, *replicated)` on every device: a kernel's product with its own columns of a weight.

    `columns` is a pytree of arrays, sharded as their types say, `out_spec` the sharding of the result. A product in
    plain jax.numpy does not need this.
    """
    specs = jax.tree.map(lambda array: jax.typeof(array).sharding.spec, columns)
    mapped = jax.shard_map(local, in_specs=(specs, *(P() for _ in replicated)), out_specs=out_spec, check_vma=False)
    return mapped(columns, *replicated)


def whole(local: Callable[..., jax.Array], *arguments: jax.Array) -> jax.Array:
    """`local(*arguments)` where one device holds all of each argument, and of the result."""
    specs = tuple(jax.typeof(array).sharding.spec for array in arguments)
    return jax.shard_map(local, in_specs=specs, out_specs=P(), check_vma=False)(*arguments)


def row_parallel(multiply: Callable[..., jax.Array], x_TF: jax.Array, w_FD: Any, *replicated: Any) -> jax.Array:
    """x @ w with both sharded over the contracted axis; the result is whole on every device.

    `multiply` is the local product, `w_FD` a plain or a quantized array sharded on its first axis. It is given
    `replicated` too, which must not enter the sum over devices more than once.
    """

    def local(*operands):
        return jax.lax.psum(multiply(*operands), TENSOR)

    rows = row_axis(x_TF)
    specs = (P(rows, TENSOR), P(TENSOR), *(P() for _ in replicated))
    return jax.shard_map(local, in_specs=specs, out_specs=P(rows, None))(x_TF, w_FD, *replicated)


def expert_parallel(local: Callable[..., jax.Array], experts: Any, *rows: jax.Array) -> jax.Array:
    """The sum over devices of `local(first_expert, experts, *rows)`.

    `rows` are arrays whose first axis is that of tokens, which are spread over the axis `context` or on every device.
    `experts` is a pytree of arrays sharded over their first axis, E; `first_expert` is the index, among all experts,
    of the first one that a device holds; on one device it is the number 0.
    """

    def summed(experts, *rows):
        per_device, alone = jax.tree.leaves(experts)[0].shape[0], jax.lax.axis_size(TENSOR) == 1
        first = 0 if alone else jax.lax.axis_index(TENSOR) * per_device
        return jax.lax.psum(local(first, experts, *rows), TENSOR)

    axis = row_axis(rows[0])
    specs = (P(TENSOR), *(P(axis) for _ in rows))
    return jax.shard_map(summed, in_specs=specs, out_specs=P(axis, None), check_vma=False)(experts, *rows)

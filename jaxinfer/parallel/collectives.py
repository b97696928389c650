"""The helpers in which the model meets several devices. Everything else of it is plain jax.numpy.

Each is a `shard_map` over the axis `tensor`: what a device computes is an ordinary function of local arrays, and the
sum over these devices stands here and nowhere else. What goes along `context` and `pipe`, and to experts, is in the
files beside this one.

Between the products of a layer every device holds all tokens, [T, D], or, where they are many, its part of them: what
stands there, norms and residuals, is then done once and not by every device, and an all-reduce becomes a
reduce-scatter before it and an all-gather after it, of the same bytes together (sequence parallelism, Korthikanti et
al. 2022, section 4.2.2). `look_up` chooses; from there on the type of x_TD says which of both it is. Where there are
even more, the parts go round a ring, under the products that need them or make them (`jaxinfer.parallel.ring`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxinfer.parallel import ring
from jaxinfer.parallel.context import row_axis
from jaxinfer.parallel.mesh import TENSOR
from pallas_kernels.all_reduce import Workspace, all_reduce, fresh_workspace, most_rows, runs

MANY_TOKENS = 256  # from which on each device holds its part of them; not measured yet
# From which on their parts go round a ring, under the products. None do: on two H100 that takes as long as products
# and whole collectives before and after them.
RING_TOKENS = math.inf
SPREAD = P(TENSOR, None)  # x_TD of which each device holds a part of the tokens
# Where the all-reduces of the program that is being traced meet, see `meeting`.
_workspace: ContextVar[Workspace | None] = ContextVar("workspace", default=None)


@contextmanager
def meeting(workspace: Workspace | None) -> Iterator[None]:
    """Small sums over devices that are traced inside are our kernel's, in this workspace of `look_up`'s; XLA's psum
    where it is None. A jitted function is given the workspace as an argument, as all that is traced outside of it.
    """
    token = _workspace.set(workspace)
    try:
        yield
    finally:
        _workspace.reset(token)


def shares_work() -> bool:
    """Whether the axis `tensor` has several devices, and all of the mesh: what `look_up` is for."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size == mesh.shape[TENSOR] > 1


def look_up(weight_VD: jax.Array, tokens_T: jax.Array, in_order: bool) -> tuple[jax.Array, Workspace | None]:
    """The rows of a table that is sharded over the vocabulary: the first sum over devices of a step.

    Args:
        in_order: whether the devices of the mesh are such that the kernel finds them.

    Returns:
        x_TD, of which each device holds its part where there are `MANY_TOKENS` that divide evenly; and where few run,
        the workspace for the step's other sums, in which the devices have then met.
    """
    (tokens,), (V, D) = tokens_T.shape, weight_VD.shape
    devices = jax.sharding.get_abstract_mesh().shape[TENSOR]
    spread, own = tokens >= MANY_TOKENS and tokens % devices == 0, V // devices

    def local(weight_VD: jax.Array, tokens_T: jax.Array) -> tuple[jax.Array, Workspace | None]:
        own_T = tokens_T - lax.axis_index(TENSOR) * own
        here_T = (own_T >= 0) & (own_T < own)
        partial_TD = jnp.where(here_T[:, None], weight_VD[jnp.where(here_T, own_T, 0)], jnp.zeros((), weight_VD.dtype))
        few = in_order and tokens <= most_rows(D, weight_VD.dtype) and runs(TENSOR, D, weight_VD.dtype)
        workspace = fresh_workspace(TENSOR, tokens, D, weight_VD.dtype) if few else None
        return _sum(partial_TD, None, spread, workspace, first=True), workspace

    in_specs = jax.typeof(weight_VD).sharding.spec, P(None)
    out_specs = SPREAD if spread else P(None, None), P(TENSOR)
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(weight_VD, tokens_T)


def all_tokens(x_TD: jax.Array) -> jax.Array:
    """x with all tokens on every device: the all-gather before a product with columns."""
    return jax.sharding.reshard(x_TD, P(None, None)) if is_spread(x_TD) else x_TD


def is_spread(x_TD: jax.Array) -> bool:
    """Whether each device holds its part of the tokens."""
    return row_axis(x_TD) == TENSOR


def goes_round(x_TD: jax.Array) -> bool:
    """Whether products take each device's part of the tokens, and give such parts, in a ring."""
    return is_spread(x_TD) and x_TD.shape[0] >= RING_TOKENS


def _sum(
    partial_TD: jax.Array, residual_TD: jax.Array | None, spread: bool, workspace: Workspace | None,
    *, first: bool = False,
) -> jax.Array:  # fmt: skip
    """residual + the sum over devices of `partial_TD`, inside a `shard_map`: each device's part of the tokens, or all.

    The norm that follows is not here: the product after it takes it in, at no launch (`jaxinfer.quantize`).
    """
    if spread:
        return _added(residual_TD, lax.psum_scatter(partial_TD, TENSOR, scatter_dimension=0, tiled=True))
    implementation = "xla" if workspace is None else "auto"
    given = {"residual_TD": residual_TD, "workspace": workspace, "first": first}
    return all_reduce(partial_TD, TENSOR, **given, implementation=implementation).out_TD


def _added(residual_TD: jax.Array | None, y_TD: jax.Array) -> jax.Array:
    return y_TD if residual_TD is None else residual_TD + y_TD


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


def column_parallel_ring(
    local: Callable[[Any, jax.Array], jax.Array], out_spec: P, columns: Any, x_TD: jax.Array
) -> jax.Array:
    """`local(columns, x)` on every device, of all tokens, where each has its part of x.

    Args:
        local: a function of local arrays and some of the tokens, in whatever order these come.
        out_spec: of the result, which has its tokens in order.
        columns: a pytree of arrays, sharded as their types say.
    """

    def on_device(columns, x_tD):
        return ring.in_order(ring.gather(partial(local, columns), x_tD))

    specs = jax.tree.map(lambda array: jax.typeof(array).sharding.spec, columns)
    # The checks of what varies over devices do not know `lax.empty`.
    mapped = jax.shard_map(on_device, in_specs=(specs, SPREAD), out_specs=out_spec, check_vma=False)
    return mapped(columns, x_TD)


def whole(local: Callable[..., jax.Array], *arguments: jax.Array | None) -> jax.Array:
    """`local(*arguments)` where one device holds all of each argument, and of the result."""
    specs = jax.tree.map(lambda array: jax.typeof(array).sharding.spec, arguments)
    return jax.shard_map(local, in_specs=specs, out_specs=P(), check_vma=False)(*arguments)


def row_parallel(
    multiply: Callable[..., jax.Array], x_TF: jax.Array, w_FD: Any, residual_TD: jax.Array | None,
    like_TD: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """residual + x @ w, x and w sharded over the contracted axis.

    Args:
        multiply: the local product.
        w_FD: a plain or a quantized array sharded on its first axis.
        like_TD: has its tokens where those of the residual and the result are; without it all are on every device.
    """
    workspace, spread = _workspace.get(), like_TD is not None and is_spread(like_TD)
    rows, around = row_axis(x_TF), like_TD is not None and goes_round(like_TD)

    def local(x_TF, w_FD, residual_TD, workspace):
        if around:
            return _added(residual_TD, ring.scatter(lambda x_tF: multiply(x_tF, w_FD), ring.parts_of(x_TF)))
        return _sum(multiply(x_TF, w_FD), residual_TD, spread, workspace)

    tokens = SPREAD if spread else P(rows, None)
    specs = P(rows, TENSOR), P(TENSOR), tokens, P(TENSOR)
    # The checks of what varies over devices do not know the kernel's call.
    mapped = jax.shard_map(local, in_specs=specs, out_specs=tokens, check_vma=workspace is None)
    return mapped(x_TF, w_FD, residual_TD, workspace)


def round_trip(
    up: Callable[[Any, jax.Array], jax.Array], columns: Any, down: Callable[..., jax.Array], w_FD: Any,
    x_TD: jax.Array, residual_TD: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """residual + up(columns, x) @ w: `column_parallel_ring`, then `row_parallel`, of each token for itself.

    The tokens stay in the order in which they came round the ring until they leave by it, and none is copied.

    Args:
        up: as `local` of the first.
        down: as `multiply` of the second.
        x_TD, residual_TD: each device's part of the tokens, and so is the result.
    """

    def on_device(columns, w_FD, x_tD, residual_tD):
        inner = ring.gather(partial(up, columns), x_tD)
        return _added(residual_tD, ring.scatter(lambda x_tF: down(x_tF, w_FD), inner))

    specs = jax.tree.map(lambda array: jax.typeof(array).sharding.spec, columns)
    mapped = jax.shard_map(on_device, in_specs=(specs, P(TENSOR), SPREAD, SPREAD), out_specs=SPREAD)
    return mapped(columns, w_FD, x_TD, residual_TD)


def expert_parallel(
    local: Callable[..., jax.Array], experts: Any, residual_TD: jax.Array | None, like_TD: jax.Array,
    *rows: jax.Array,
) -> jax.Array:  # fmt: skip
    """residual + the sum over devices of `local(first_expert, experts, *rows)`.

    `rows` are arrays whose first axis is that of tokens, all of which are on every device of the axis. `experts` is a
    pytree of arrays sharded over their first axis, E; `first_expert` is the index, among all experts, of the first one
    that a device holds; on one device it is the number 0. The rest as for `row_parallel`.
    """
    workspace, spread = _workspace.get(), is_spread(like_TD)

    def summed(experts, residual_TD, workspace, *rows):
        per_device, alone = jax.tree.leaves(experts)[0].shape[0], lax.axis_size(TENSOR) == 1
        first = 0 if alone else lax.axis_index(TENSOR) * per_device
        return _sum(local(first, experts, *rows), residual_TD, spread, workspace)

    axis = row_axis(rows[0])
    tokens = SPREAD if spread else P(axis, None)
    specs = (P(TENSOR), tokens, P(TENSOR), *(P(axis) for _ in rows))
    mapped = jax.shard_map(summed, in_specs=specs, out_specs=tokens, check_vma=False)
    return mapped(experts, residual_TD, workspace, *rows)

"""Products whose tokens come or go round a ring of devices while they run: the collective matmul (Wang et al. 2023,
"Overlap Communication with Dependent Computation via Decomposition in Large Deep Learning Models").

Each function is for use inside a `shard_map` over the axis `tensor` of n devices. It has n steps, of a product with a
part of the tokens each, and n - 1 messages to the next device, each of which is on its way while a product runs: XLA
for GPUs makes of a `ppermute` a start, as early as what it sends is there, and a done, as late as what it brings is
needed, also where its latency-hiding scheduler is off: on two H100 every message was under a product. Barriers keep
the steps as they are written, since XLA

- makes one product of two that have an operand in common, the weight, where a step's operands and result are less than
  64 MB together (`xla_gpu_dot_merger_threshold_mb`): it would begin after the last message;
- puts a product that needs no other at any place, also before the message is sent that it is to hide;
- makes a sum the last part of the product that it adds, which would then wait for the message that it is added to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from jaxinfer.parallel.mesh import TENSOR

Product = Callable[[jax.Array], jax.Array]  # of a part of the tokens, [t, ...] to [t, ...]


def passed_on(block: Any, axis: str) -> Any:
    """A pytree of arrays from the device before this one in the ring of an axis."""
    count = lax.axis_size(axis)
    ring = [(rank, (rank + 1) % count) for rank in range(count)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis, ring), block)


def gather(product: Product, x_tD: jax.Array) -> list[jax.Array]:
    """The product of every device's part of the tokens: an all-gather under a column-parallel product.

    Args:
        x_tD: this device's part.

    Returns:
        the n products, of this device's part first, then of that of the device before it, and so on.
    """
    products = []
    for _ in range(lax.axis_size(TENSOR) - 1):
        coming_tD = passed_on(x_tD, TENSOR)
        products.append(product(x_tD))
        x_tD = _after(products[-1], coming_tD)
    return [*products, product(x_tD)]


def scatter(product: Product, parts: Sequence[jax.Array]) -> jax.Array:
    """The sum over devices of the product of this device's part of the tokens: a reduce-scatter under a row-parallel
    product.

    The sum of a part begins on the device after its own and ends there, so that its terms are added in the order of
    the ring, each sum in the products' dtype.

    Args:
        parts: in the order of `gather`.
    """
    sum_tD = None
    for part in (*parts[1:], parts[0]):
        if sum_tD is None:
            sum_tD = product(part)
        else:
            coming_tD = passed_on(sum_tD, TENSOR)
            sum_tD = coming_tD + lax.optimization_barrier(product(_after(sum_tD, part)))
    assert sum_tD is not None
    return sum_tD


def in_order(parts: Sequence[jax.Array]) -> jax.Array:
    """All tokens in order, of parts in the order of `gather`."""
    (rows, *shape), count = parts[0].shape, len(parts)
    y_T = lax.empty((count * rows, *shape), parts[0].dtype)
    for nth, part in enumerate(parts):
        y_T = lax.dynamic_update_slice_in_dim(y_T, part, _owner(nth) * rows, axis=0)
    return y_T


def parts_of(x_T: jax.Array) -> list[jax.Array]:
    """The parts of all tokens, in the order of `gather`: the inverse of `in_order`."""
    count = lax.axis_size(TENSOR)
    rows = x_T.shape[0] // count
    return [lax.dynamic_slice_in_dim(x_T, _owner(nth) * rows, rows, axis=0) for nth in range(count)]


def _owner(nth: int) -> jax.Array:
    """Whose is the nth part in the order of `gather`."""
    return (lax.axis_index(TENSOR) - nth) % lax.axis_size(TENSOR)


def _after(done: jax.Array, x: jax.Array) -> jax.Array:
    """x, for what must not run before `done` is there."""
    return lax.optimization_barrier((done, x))[1]

"""KV heads as slots: a mesh with more devices than a model has KV heads holds every KV head several times.

The queries of a KV head are divided over its copies, in order. Checkpoints hold each KV head once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# By the end of a parameter's path: the axis of the KV heads, and how many of the last entries of the axis after it
# belong to the KV head itself (its key and its value) and not to its queries.
_HEADS = {
    "attention.qkv_DKgH": (1, 2),
    "attention.qkv_bias_KgH": (0, 2),
    "attention.q_norm.scale_KgH": (0, 0),
    "attention.k_norm.scale_KgH": (0, 1),
    "attention.sinks_Kg": (0, 0),
}


def repeats(path: str, shape: tuple[int, ...], num_kv_heads: int) -> int:
    """How many slots of the parameter hold the same KV head; 1 for parameters without KV heads."""
    heads = _heads(path)
    return shape[heads[0]] // num_kv_heads if heads else 1


def spread(path: str, x: jax.Array, times: int) -> jax.Array:
    """From one slot for each KV head to `times` slots: [K, queries + own] to [K times, queries / times + own]."""
    heads = _heads(path)
    if heads is None or times == 1:
        return x
    axis, own = heads
    queries, kept = _parted(x, axis, own)
    slots, shared, *rest = queries.shape
    queries = queries.reshape(slots * times, shared // times, *rest)
    return _joined(queries, jnp.repeat(kept, times, axis=0), axis)


def gather(path: str, x: jax.Array | np.ndarray, times: int) -> jax.Array | np.ndarray:
    """The inverse of `spread`."""
    heads = _heads(path)
    if heads is None or times == 1:
        return x
    axis, own = heads
    queries, kept = _parted(x, axis, own)
    slots, share, *rest = queries.shape
    queries = queries.reshape(slots // times, share * times, *rest)
    return _joined(queries, kept[::times], axis)


def _heads(path: str) -> tuple[int, int] | None:
    return next((heads for name, heads in _HEADS.items() if path.endswith(name)), None)


def _parted(x: jax.Array | np.ndarray, axis: int, own: int) -> tuple[jax.Array, jax.Array]:
    """Queries and the KV head's own entries, with slots and entries as the first two axes."""
    x = jnp.moveaxis(x, (axis, axis + 1), (0, 1))
    return x[:, : x.shape[1] - own], x[:, x.shape[1] - own :]


def _joined(queries: jax.Array, kept: jax.Array, axis: int) -> jax.Array:
    return jnp.moveaxis(jnp.concatenate([queries, kept], axis=1), (0, 1), (axis, axis + 1))

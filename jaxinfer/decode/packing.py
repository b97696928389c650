"""Many small arrays in one, since every array that goes to a GPU costs the host some 40 us."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Form = tuple[jax.tree_util.PyTreeDef, tuple[tuple[tuple[int, ...], str], ...]]  # structure; shapes and dtypes


def packed(tree: Any) -> tuple[np.ndarray, Form]:
    """The bits of a pytree's host arrays, all of four bytes an entry, as uint32 [U]; and what `unpacked` needs."""
    leaves, structure = jax.tree.flatten(tree)
    bits_U = np.concatenate([np.ravel(leaf).view(np.uint32) for leaf in leaves])
    return bits_U, (structure, tuple((leaf.shape, leaf.dtype.name) for leaf in leaves))


def unpacked(packed_U: jax.Array, form: Form) -> Any:
    """The inverse of `packed`, on the device."""
    structure, leaves = form
    parts = jnp.split(packed_U, np.cumsum([int(np.prod(shape)) for shape, _ in leaves])[:-1])
    arrays = [
        jax.lax.bitcast_convert_type(part, dtype).reshape(shape)
        for part, (shape, dtype) in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)

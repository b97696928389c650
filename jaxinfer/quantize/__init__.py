"""The one seam between the model and the way its weights are stored."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def einsum(spec: str, x: jax.Array, w: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """`jnp.einsum(spec, x, w)` of activations and a weight; the result is in `dtype`, by default that of `x`."""
    return jnp.einsum(spec, x, w, preferred_element_type=dtype or x.dtype)

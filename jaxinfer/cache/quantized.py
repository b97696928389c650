"""Keys and values in 8 bits: every vector of a head has a scale of its own, so that none depends on another token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # the number that a vector's largest component becomes
SCALE = jnp.dtype(jnp.float32)
_FLOAT8, _BYTE = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.uint8)
# Below it a vector is stored as if it were this large: zeros stay zeros, and a scale is a number to divide by.
SMALLEST_SCALE = 2.0**-64


def quantize(x_TKH: Float[Array, "T K H"], dtype: jnp.dtype) -> tuple[jax.Array, Float32[Array, "T K"]]:
    """Vectors as `dtype` and a scale each: a component is value x scale.

    A component of an int8 vector is off by at most half the scale, one of a float8 vector by at most 1/16 of itself,
    or by 2^-10 of the scale where that is more. What is not finite makes its whole vector NaN.

    Args:
        dtype: one of LARGEST.

    Returns:
        values_TKH in `dtype`, and scales_TK.
    """
    x_TKH = x_TKH.astype(SCALE)
    scales_TK = jnp.maximum(jnp.abs(x_TKH).max(axis=2) / LARGEST[dtype.name], SMALLEST_SCALE)
    values_TKH = x_TKH / scales_TK[..., None]
    if jnp.issubdtype(dtype, jnp.integer):
        values_TKH = jnp.round(values_TKH)
    return values_TKH.astype(dtype), scales_TK


def numbers(pool: jax.Array) -> jax.Array:
    """What a pool holds, 8-bit floats as such: the inverse of `as_moved`. It costs nothing."""
    return lax.bitcast_convert_type(pool, _FLOAT8) if pool.dtype == _BYTE else pool

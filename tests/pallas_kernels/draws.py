"""Normal random numbers for the arguments of kernels: drawn by JAX, or by numpy, which compiles nothing."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Normal = Callable[..., jax.Array]  # of a shape, a dtype, a scale and a mean


def on_the_device(seed: int = 0) -> Normal:
    """For large arrays, and for arrays that exist only as shapes."""
    count = iter(range(1000))

    def normal(shape: tuple[int, ...], dtype: jnp.dtype, scale: float = 1.0, mean: float = 0.0) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), next(count))
        return (mean + scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return normal


def on_the_host(seed: int = 0) -> Normal:
    """For small arrays: JAX would compile a program for every shape, which takes longer than most tests."""
    rng = np.random.default_rng(seed)

    def normal(shape: tuple[int, ...], dtype: jnp.dtype, scale: float = 1.0, mean: float = 0.0) -> jax.Array:
        x = rng.standard_normal(shape, np.float32)
        return jnp.asarray((np.float32(mean) + np.float32(scale) * x).astype(dtype))

    return normal

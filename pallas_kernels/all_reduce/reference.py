"""The specification of `all_reduce`, in float32."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.all_reduce.arguments import Arguments, Reduced


def all_reduce(arguments: Arguments) -> Reduced:
    dtype = arguments.partial_TD.dtype
    sum_TD = lax.psum(arguments.partial_TD.astype(jnp.float32), arguments.axis)
    return finished(sum_TD, arguments, dtype)


def finished(sum_TD: jax.Array, arguments: Arguments, dtype: jnp.dtype) -> Reduced:
    """The residual is added in float32 and rounded to `dtype`; the norm is that of the rounded result."""
    out_TD = sum_TD.astype(jnp.float32)
    if arguments.residual_TD is not None:
        out_TD = out_TD + arguments.residual_TD.astype(jnp.float32)
    out_TD = out_TD.astype(dtype)
    if arguments.norm_scale_D is None:
        return Reduced(out_TD, None)
    return Reduced(out_TD, _normalized(out_TD, arguments.norm_scale_D, arguments.norm_eps))


def _normalized(x_TD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """RMSNorm (Zhang and Sennrich 2019, equation 4)."""
    x = x_TD.astype(jnp.float32)
    mean = jnp.mean(x * x, axis=-1, keepdims=True)
    return (x * lax.rsqrt(mean + eps) * scale_D.astype(jnp.float32)[None, :]).astype(x_TD.dtype)

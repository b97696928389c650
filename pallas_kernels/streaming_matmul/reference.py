"""The specification of `streaming_matmul`, in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.streaming_matmul.arguments import PRODUCTS, Arguments


def streaming_matmul(arguments: Arguments) -> jax.Array:
    x_MD, w = normalized(arguments), arguments.w.astype(jnp.float32)
    product = jnp.einsum(PRODUCTS[arguments.w_axes], x_MD, w, precision=jax.lax.Precision.HIGHEST)
    return finished(product, arguments)


def normalized(arguments: Arguments) -> jax.Array:
    """x_MD in float32, after RMSNorm where there is one (Zhang and Sennrich 2019, equation 4)."""
    x_MD = arguments.x_MD.astype(jnp.float32)
    if arguments.norm_scale_D is None:
        return x_MD
    mean_M1 = jnp.mean(x_MD * x_MD, axis=-1, keepdims=True)
    scale_1D = arguments.norm_scale_D.astype(jnp.float32)[None]
    return x_MD * jax.lax.rsqrt(mean_M1 + arguments.norm_eps) * scale_1D


def finished(product: jax.Array, arguments: Arguments) -> jax.Array:
    """The bias, the gate and the residual, in float32; then the one rounding."""
    product = product.astype(jnp.float32)
    if arguments.bias is not None:
        product = product + arguments.bias.astype(jnp.float32)[None]
    if arguments.gated:
        product = jax.nn.silu(product[:, 0]) * product[:, 1]
    if arguments.residual_MN is not None:
        product = product + arguments.residual_MN.astype(jnp.float32)
    return product.astype(arguments.out_dtype)

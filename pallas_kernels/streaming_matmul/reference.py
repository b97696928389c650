"""The specification of `streaming_matmul`, in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.streaming_matmul.arguments import Arguments


def streaming_matmul(arguments: Arguments) -> jax.Array:
    x, w = normalized(arguments), weights(arguments).astype(jnp.float32)
    return finished(jnp.einsum(arguments.product, x, w, precision=jax.lax.Precision.HIGHEST), arguments)


def normalized(arguments: Arguments) -> jax.Array:
    """x in float32, after RMSNorm where there is one (Zhang and Sennrich 2019, equation 4)."""
    x = arguments.x.astype(jnp.float32)
    if arguments.norm_scale_D is None:
        return x
    mean = jnp.mean(x * x, axis=-1, keepdims=True)
    scale = jnp.expand_dims(arguments.norm_scale_D.astype(jnp.float32), range(x.ndim - 1))
    return x * jax.lax.rsqrt(mean + arguments.norm_eps) * scale


def weights(arguments: Arguments) -> jax.Array:
    """The weight, or for groups that of the expert of each."""
    return arguments.w if arguments.expert_A is None else arguments.w[arguments.expert_A]


def finished(product: jax.Array, arguments: Arguments) -> jax.Array:
    """The bias, the gate and the residual, in float32; then the one rounding."""
    product = product.astype(jnp.float32)
    if (bias := arguments.bias) is not None:
        bias = bias[None] if arguments.expert_A is None else bias[arguments.expert_A][:, None]
        product = product + bias.astype(jnp.float32)
    if arguments.gated:
        product = jax.nn.silu(product[..., 0, :]) * product[..., 1, :]
    if arguments.residual_MN is not None:
        product = product + arguments.residual_MN.astype(jnp.float32)
    return product.astype(arguments.out_dtype)

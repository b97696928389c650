"""`streaming_matmul` in plain XLA: what many tokens, other devices and other dtypes get.

XLA's matmul rounds its input and, unless the result is float32, its product to the dtype of x: the norm before it
and the epilogue after it are other kernels, and the weights of chosen experts are copied before it.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.streaming_matmul.arguments import Arguments
from pallas_kernels.streaming_matmul.reference import finished, normalized, weights


@jax.jit
def streaming_matmul(arguments: Arguments) -> jax.Array:
    """See the public op."""
    x = normalized(arguments).astype(arguments.x.dtype)
    product_dtype = jnp.float32 if arguments.out_dtype == jnp.float32 else x.dtype
    product = jnp.einsum(arguments.product, x, weights(arguments), preferred_element_type=product_dtype)
    return finished(product, arguments)

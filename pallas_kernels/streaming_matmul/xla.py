"""`streaming_matmul` in plain XLA: what many tokens, other devices and other dtypes get.

XLA's matmul rounds its input and, unless the result is float32, its product to the dtype of x: the norm before it
and the epilogue after it are other kernels.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.streaming_matmul.arguments import PRODUCTS, Arguments
from pallas_kernels.streaming_matmul.reference import finished, normalized


@jax.jit
def streaming_matmul(arguments: Arguments) -> jax.Array:
    """See the public op."""
    x_MD = normalized(arguments).astype(arguments.x_MD.dtype)
    product_dtype = jnp.float32 if arguments.out_dtype == jnp.float32 else x_MD.dtype
    product = jnp.einsum(PRODUCTS[arguments.w_axes], x_MD, arguments.w, preferred_element_type=product_dtype)
    return finished(product, arguments)

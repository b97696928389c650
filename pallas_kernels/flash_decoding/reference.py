"""The specification of `flash_decoding`: that of `flash_attention`, with Q queries in every sequence."""

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise import Options, PagedKV
from pallas_kernels.flash_attention import reference


def flash_decoding(
    q_BQNH: jax.Array,
    kv: PagedKV,
    table_BJ: jax.Array,
    lengths_B: jax.Array,
    sinks_N: jax.Array | None,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    B, Q, N, H = q_BQNH.shape
    cu_q_B1 = Q * jnp.arange(B + 1, dtype=jnp.int32)
    out_TNH, lse_TN = reference.flash_attention(
        q_BQNH.reshape(B * Q, N, H), kv, table_BJ, cu_q_B1, lengths_B, sinks_N, options
    )
    return out_TNH.reshape(B, Q, N, H), lse_TN.reshape(B, Q, N)

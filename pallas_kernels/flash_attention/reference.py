"""The specification of `flash_attention`: dense, float32, one score for every token and key."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise import Options, PagedKV
from pallas_kernels.dense import attend
from pallas_kernels.stripe import Stripe, key_positions


@partial(jax.jit, static_argnames="options")
def flash_attention(
    q_TNH: jax.Array,
    kv: PagedKV,
    table_RJ: jax.Array,
    cu_q_R1: jax.Array,
    lengths_R: jax.Array,
    sinks_N: jax.Array | None,
    options: Options,
    kv_lengths_R: jax.Array | None = None,
    stripe: Stripe | None = None,
) -> tuple[jax.Array, jax.Array]:
    T, R = len(q_TNH), len(lengths_R)
    token_T = jnp.arange(T, dtype=jnp.int32)
    sequence_T = jnp.sum(token_T[:, None] >= cu_q_R1[None, 1:], axis=1, dtype=jnp.int32)  # R for padding
    last_T = jnp.minimum(sequence_T, R - 1)
    position_T1 = (lengths_R[last_T] - cu_q_R1[last_T + 1] + token_T)[:, None]
    key_1C = key_positions(table_RJ, kv.page_size, stripe)
    visible_TC = (key_1C <= position_T1) & (sequence_T < R)[:, None]
    if options.window is not None:
        visible_TC &= key_1C > position_T1 - options.window
    if kv_lengths_R is not None:
        visible_TC &= key_1C < kv_lengths_R[last_T][:, None]
    return attend(q_TNH, kv, table_RJ[last_T], visible_TC, sinks_N, options)

"""The specification of `flash_attention`: dense, float32, one score for every token and key."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise import Options, PagedKV


@partial(jax.jit, static_argnames="options")
def flash_attention(
    q_TNH: jax.Array,
    kv: PagedKV,
    table_RJ: jax.Array,
    cu_q_R1: jax.Array,
    lengths_R: jax.Array,
    sinks_N: jax.Array | None,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    T, R = len(q_TNH), len(lengths_R)
    token_T = jnp.arange(T, dtype=jnp.int32)
    sequence_T = jnp.sum(token_T[:, None] >= cu_q_R1[None, 1:], axis=1, dtype=jnp.int32)  # R for padding
    last_T = jnp.minimum(sequence_T, R - 1)
    position_T1 = (lengths_R[last_T] - cu_q_R1[last_T + 1] + token_T)[:, None]
    key_1C = jnp.arange(table_RJ.shape[1] * kv.page_size, dtype=jnp.int32)[None]
    visible_TC = (key_1C <= position_T1) & (sequence_T < R)[:, None]
    if options.window is not None:
        visible_TC &= key_1C > position_T1 - options.window
    return attend(q_TNH, kv, table_RJ[last_T], visible_TC, sinks_N, options)


def attend(
    q_TNH: jax.Array,
    kv: PagedKV,
    table_TJ: jax.Array,
    visible_TC: jax.Array,
    sinks_N: jax.Array | None,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """Attention of every token to the keys that it sees of those in its row of the table."""
    T, N, H = q_TNH.shape
    K = kv.k_PSKH.shape[2]
    k_TKCH, v_TKCH = kv.load(table_TJ, jnp.dtype(jnp.float32))
    q_TKgH = q_TNH.astype(jnp.float32).reshape(T, K, N // K, H)
    scores_TKgC = jnp.einsum("TKgH,TKCH->TKgC", q_TKgH, k_TKCH, precision="highest") * options.scale
    if options.soft_cap is not None:
        scores_TKgC = options.soft_cap * jnp.tanh(scores_TKgC / options.soft_cap)
    scores_TNC = jnp.where(visible_TC[:, None], scores_TKgC.reshape(T, N, -1), -jnp.inf)
    lse_TN = jax.nn.logsumexp(scores_TNC, axis=-1)
    if sinks_N is not None:
        with_sink_TN = jnp.logaddexp(lse_TN, sinks_N.astype(jnp.float32)[None])
        lse_TN = jnp.where(visible_TC.any(1)[:, None], with_sink_TN, -jnp.inf)
    weights_TNC = jnp.where(visible_TC[:, None], jnp.exp(scores_TNC - lse_TN[..., None]), 0.0)
    v_TKCH = jnp.where(visible_TC[:, None, :, None], v_TKCH, 0.0)
    weights_TKgC = weights_TNC.reshape(T, K, N // K, -1)
    out_TKgH = jnp.einsum("TKgC,TKCH->TKgH", weights_TKgC, v_TKCH, precision="highest")
    return out_TKgH.reshape(T, N, H).astype(q_TNH.dtype), lse_TN

"""Attention as it is defined, one score for every token and key: what the specifications have in common."""

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise import Options, PagedKV


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

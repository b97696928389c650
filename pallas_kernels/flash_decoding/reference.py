"""The specification of `flash_decoding`: dense, float32, one score for every query and key."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise import Options, PagedKV
from pallas_kernels.dense import attend
from pallas_kernels.flash_decoding.tree import unpack_tree_mask
from pallas_kernels.stripe import Stripe, key_positions


@partial(jax.jit, static_argnames="options")
def flash_decoding(
    q_BQNH: jax.Array,
    kv: PagedKV,
    table_BJ: jax.Array,
    lengths_B: jax.Array,
    sinks_N: jax.Array | None,
    options: Options,
    tree_mask_BQW: jax.Array | None = None,
    stripe: Stripe | None = None,
) -> tuple[jax.Array, jax.Array]:
    B, Q, N, H = q_BQNH.shape
    if tree_mask_BQW is None:
        path_BQQ = jnp.broadcast_to(jnp.tri(Q, dtype=jnp.bool_), (B, Q, Q))  # every query sees those before it
    else:
        path_BQQ = unpack_tree_mask(tree_mask_BQW)
    depth_BQ = jnp.maximum(path_BQQ.sum(2, dtype=jnp.int32), 1) - 1
    # Keys counted from the first new one, at which depth 0 is.
    key_BC = key_positions(table_BJ, kv.page_size, stripe) - (lengths_B - Q)[:, None]
    new_BC, nth_BC = (key_BC >= 0) & (key_BC < Q), jnp.clip(key_BC, 0, Q - 1)
    visible_BQC = (key_BC < 0)[:, None] | (new_BC[:, None] & jnp.take_along_axis(path_BQQ, nth_BC[:, None], axis=2))
    if options.window is not None:
        key_depth_BC = jnp.where(new_BC, jnp.take_along_axis(depth_BQ, nth_BC, axis=1), key_BC)
        visible_BQC &= key_depth_BC[:, None] > depth_BQ[:, :, None] - options.window
    q_TNH, visible_TC = q_BQNH.reshape(B * Q, N, H), visible_BQC.reshape(B * Q, -1)
    out_TNH, lse_TN = attend(q_TNH, kv, jnp.repeat(table_BJ, Q, axis=0), visible_TC, sinks_N, options)
    return out_TNH.reshape(B, Q, N, H), lse_TN.reshape(B, Q, N)

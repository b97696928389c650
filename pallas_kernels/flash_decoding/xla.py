"""`flash_decoding` in plain XLA: the pages of each slot are gathered, then attended to in one shot.

K and V move three times: read from the pages, written in the order of the batched matmul, read by it. Multiplying
and reducing straight from the pages would read them once, but without tensor cores: on an H200 a step of Llama-3-8B
took 4.65 against 4.47 ms so, and 5.73 against 5.27 ms at batch 16.

A context of more than BLOCK_KEYS keys goes block by block, which bounds the gathered copy.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise import Attend, Options, PagedKV, attend
from pallas_kernels.flash_decoding.tree import make_tree
from pallas_kernels.stripe import Stripe

BLOCK_KEYS = 8192


@partial(jax.jit, static_argnames=("options", "attend", "block_keys"))
def flash_decoding(
    q_BQNH: jax.Array,
    kv: PagedKV,
    table_BJ: jax.Array,
    lengths_B: jax.Array,
    sinks_N: jax.Array | None,
    options: Options,
    tree_mask_BQW: jax.Array | None = None,
    stripe: Stripe | None = None,
    *,
    attend: Attend = attend,
    block_keys: int = BLOCK_KEYS,
) -> tuple[jax.Array, jax.Array]:
    """See the public op."""
    Q = q_BQNH.shape[1]
    position_BQ = (lengths_B - Q)[:, None] + jnp.arange(Q, dtype=jnp.int32)[None]
    tree = None if tree_mask_BQW is None else make_tree(tree_mask_BQW, options.window)
    some = {} if stripe is None else {"stripe": stripe}
    return attend(q_BQNH, position_BQ, kv, table_BJ, sinks_N, options, block_keys=block_keys, tree=tree, **some)

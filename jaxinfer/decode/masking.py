"""The logits that masks leave, on the device; `masks` has the words, on the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.decode.masks import WORD


def allowed(words_WU: jax.Array, vocab: int) -> jax.Array:
    """The bits of masks as bool [W, V]."""
    bits_WUn = words_WU[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32)[None, None, :] & jnp.uint32(1)
    return bits_WUn.reshape(words_WU.shape[0], -1)[:, :vocab] == 1


def masked(logits_WV: jax.Array, words_WU: jax.Array) -> jax.Array:
    """The logits of the tokens that masks allow, -inf for the others."""
    allowed_WV = jax.sharding.reshard(allowed(words_WU, logits_WV.shape[1]), jax.typeof(logits_WV).sharding)
    return jnp.where(allowed_WV, logits_WV, -jnp.inf)

"""The model draws after each proposed token; what agrees counts."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxinfer.decode import sampling
from jaxinfer.decode.sampling import Needs, Sampled, SamplingState
from jaxinfer.decode.slots import SlotState, advance

UNROLLED = 16  # draws whose bookkeeping is written out: a few small kernels each, and no turns of a loop


def verify(
    state: SlotState, logits_WV: jax.Array, drafts_Bk: jax.Array, needs: Needs
) -> tuple[SlotState, Sampled, jax.Array]:
    """Draws k + 1 tokens for every slot, and takes those before and at the first that is not as proposed.

    Every draw is plain decoding's own, with the penalties that the proposed tokens before it bring. A token that ends
    the output is the last one.

    Args:
        logits_WV: after the newest token and each proposed one, slot by slot, [B x (k + 1), V], not sharded.
        drafts_Bk: the proposed tokens.

    Returns:
        the state after them; the draws, each field with leading axes k + 1 and B; and which of them count, bool
        [k + 1, B].
    """
    slots, queries = drafts_Bk.shape[0], drafts_Bk.shape[1] + 1
    index_BQ = state.index_B[:, None] + jnp.arange(queries, dtype=jnp.int32)[None]
    rows = sampling.sample(logits_WV, expected(state.sampling, drafts_Bk), index_BQ.reshape(-1), needs)
    sampled = jax.tree.map(lambda x_W: jnp.moveaxis(x_W.reshape(slots, queries, *x_W.shape[1:]), 1, 0), rows)
    agreed_Bk = jnp.cumprod((drafts_Bk == sampled.tokens_W[:-1].T).astype(jnp.int32), axis=1)
    accepted_B = agreed_Bk.sum(axis=1)

    def take(state: SlotState, draw: tuple[jax.Array, Sampled]) -> tuple[SlotState, jax.Array]:
        emits_B = state.active_B & (draw[0] <= accepted_B)
        return advance(state, draw[1], emits_B, state.length_B + 1), emits_B

    draws = jnp.arange(queries, dtype=jnp.int32), sampled
    state, emits_QB = jax.lax.scan(take, state, draws, unroll=min(queries, UNROLLED))
    return state, sampled, emits_QB


def expected(state: SamplingState, drafts_Bk: jax.Array) -> SamplingState:
    """What the sampler would keep for each slot after none, one, and so on up to all of the proposed tokens: a row for
    each, slot by slot."""
    slots, drafts = drafts_Bk.shape
    rows = jax.tree.map(lambda x_B: jnp.repeat(x_B, drafts + 1, axis=0), state)
    row_BQ = jnp.arange(slots * (drafts + 1), dtype=jnp.int32).reshape(slots, drafts + 1)
    before_Qk = jnp.tri(drafts + 1, drafts, -1, dtype=jnp.int32)  # 1 where the token comes before the draw
    shape = slots, drafts + 1, drafts
    counts_WV = rows.counts_BV.at[
        jnp.broadcast_to(row_BQ[:, :, None], shape), jnp.broadcast_to(drafts_Bk[:, None], shape)
    ].add(jnp.broadcast_to(before_Qk[None], shape))
    return replace(rows, counts_BV=counts_WV)

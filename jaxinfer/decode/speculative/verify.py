"""The model draws after each proposed token; what agrees counts."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.decode import sampling
from jaxinfer.decode.sampling import Needs, Sampled, SamplingState
from jaxinfer.decode.slots import SlotState, advance_several
from jaxinfer.decode.speculative.method import Proposal, Typical
from jaxinfer.decode.tree import Ancestry, Tree

ACCEPTED, LEFT = 2, 3  # streams of draws, beside that of proposals


class Verified(NamedTuple):
    """What a step brought that verified proposals. Of a chain there are d = k + 1 draws of every slot.

    Attributes:
        state: of the slots, after the draws that count.
        sampled: the draws, each field with leading axes d and B.
        emits_dB: bool, which of them count.
        rows_Bd: int32, the row of the slot, 0..k, after which each was drawn.
        drawn_BQ: int32, what was drawn after every row of the slot, whether it counts or not.
    """

    state: SlotState
    sampled: Sampled
    emits_dB: jax.Array
    rows_Bd: jax.Array
    drawn_BQ: jax.Array


def verify(
    state: SlotState, logits_WV: jax.Array, proposal: Proposal, needs: Needs, tree: Ancestry | None = None,
    typical: Typical | None = None,
) -> Verified:  # fmt: skip
    """Draws a token for every slot after the newest one and each proposed one, and takes those before and at the first
    that was not proposed.

    Every draw is plain decoding's own, with the penalties that the proposed tokens before it bring; or for proposals
    that were drawn, what `accepted_or_left` says; or with typical acceptance, what `likely_or_drawn` says. A token
    that ends the output is the last one.

    Args:
        logits_WV: after the newest token and each proposed one, slot by slot, [B x (k + 1), V], not sharded.
        tree: which of the tokens, none of them drawn, follow which; None where each follows the one before.
    """
    drafts_Bk = proposal.drafts_Bk
    slots, queries = drafts_Bk.shape[0], drafts_Bk.shape[1] + 1
    if tree is None:
        depth_BQ = jnp.arange(queries, dtype=jnp.int32)[None]
        before_BQk = jnp.tri(queries, queries - 1, -1, dtype=jnp.int32)[None]
    else:
        depth_BQ, before_BQk = jnp.asarray(tree.depth_BQ), jnp.asarray(tree.seen_BQQ[:, :, 1:], jnp.int32)
    index_BQ = state.index_B[:, None] + depth_BQ
    after, index_W = expected(state.sampling, drafts_Bk, before_BQk), index_BQ.reshape(-1)
    if needs.level == "greedy" or (proposal.kept_BkV is None and typical is None):
        rows = sampling.sample(logits_WV, after, index_W, needs)
    else:
        kept_WV = sampling.kept(logits_WV, after, index_W, needs)
        if typical is not None:
            tokens_W = likely_or_drawn(kept_WV, after, index_W, drafts_Bk, tree or chain(queries - 1), typical)
        else:
            assert tree is None
            tokens_W = accepted_or_left(kept_WV, after, index_W, proposal)
        rows = sampling.report(logits_WV, tokens_W, needs)
    sampled = jax.tree.map(lambda x_W: jnp.moveaxis(x_W.reshape(slots, queries, *x_W.shape[1:]), 1, 0), rows)
    drawn_BQ = sampled.tokens_W.T
    if tree is None:
        rows_Bd = jnp.broadcast_to(depth_BQ, (slots, queries))
        agreed_Bk = jnp.cumprod((drafts_Bk == drawn_BQ[:, :-1]).astype(jnp.int32), axis=1)
        wanted_B = agreed_Bk.sum(axis=1) + 1
    else:
        rows_Bd, wanted_B = walk(agreeing(drafts_Bk, drawn_BQ, tree), tree)
        slot_1B = jnp.arange(slots, dtype=jnp.int32)[None]
        sampled = jax.tree.map(lambda x_QB: x_QB[rows_Bd.T, slot_1B], sampled)
    state, emits_dB = advance_several(state, sampled.tokens_W, wanted_B)
    return Verified(state, sampled, emits_dB, rows_Bd, drawn_BQ)


def agreeing(drafts_Bk: jax.Array, drawn_BQ: jax.Array, tree: Ancestry) -> jax.Array:
    """Which proposed tokens are what was drawn after the token that they follow, bool [B, k]."""
    return drafts_Bk == jnp.take_along_axis(drawn_BQ, jnp.asarray(tree.parent_Bk), axis=1)


def walk(right_Bk: jax.Array, tree: Ancestry) -> tuple[jax.Array, jax.Array]:
    """The path from the newest token to a token that is right, and so on, as far as that goes.

    Returns:
        its rows, int32 [B, d], and how many of these were reached, int32 [B].
    """
    reached_BQ = ~(~right_Bk[:, None] & tree.seen_BQQ[:, :, 1:]).any(axis=2)
    # The deepest that was reached; of two equal tokens that follow the same one, either may have led there.
    reached_depth_BQ = jnp.where(reached_BQ, tree.depth_BQ, -1)
    last_B = jax.lax.argmax(reached_depth_BQ, 1, jnp.int32)
    slot_B = jnp.arange(len(last_B), dtype=jnp.int32) if len(tree.rows_BQd) > 1 else 0
    return jnp.asarray(tree.rows_BQd)[slot_B, last_B], reached_depth_BQ.max(axis=1) + 1


def expected(state: SamplingState, drafts_Bk: jax.Array, before_BQk: jax.Array) -> SamplingState:
    """What the sampler would keep for each slot after some of the proposed tokens: a row for each draw, slot by slot.

    Args:
        before_BQk: 1 where a token comes before a draw, else 0; given once if it is the same for all slots.
    """
    slots, drafts = drafts_Bk.shape
    rows = jax.tree.map(lambda x_B: jnp.repeat(x_B, drafts + 1, axis=0), state)
    row_BQ = jnp.arange(slots * (drafts + 1), dtype=jnp.int32).reshape(slots, drafts + 1)
    shape = slots, drafts + 1, drafts
    counts_WV = rows.counts_BV.at[
        jnp.broadcast_to(row_BQ[:, :, None], shape), jnp.broadcast_to(drafts_Bk[:, None], shape)
    ].add(jnp.broadcast_to(before_BQk, shape))
    return replace(rows, counts_BV=counts_WV)


def accepted_or_left(kept_WV: jax.Array, state: SamplingState, index_W: jax.Array, proposal: Proposal) -> jax.Array:
    """The token of each row by the rule of speculative sampling (Leviathan et al. 2022, appendix A.1).

    With p the model's distribution of a token and q the one that it was proposed with, the proposal counts with the
    probability min(1, p / q) of that token. Otherwise a token is drawn from max(p - q, 0), which the proposed one is
    never: so the token is as drawn from p. After all proposals, and in greedy rows, it is plain decoding's.

    Args:
        kept_WV: what p is, for k + 1 rows of each slot; see `sampling.kept`.
        state, index_W: of the rows.

    Returns:
        int32 [W].
    """
    assert proposal.kept_BkV is not None
    slots, drafts, vocab = proposal.kept_BkV.shape

    def before(x_W: jax.Array) -> jax.Array:
        """Of the rows that have a proposal, slot by slot."""
        return x_W.reshape(slots, drafts + 1, *x_W.shape[1:])[:, :drafts].reshape(slots * drafts, *x_W.shape[1:])

    plain_W, proposed_R = sampling.draw(kept_WV, state, index_W), proposal.drafts_Bk.reshape(-1)
    p_RV, q_RV = jax.nn.softmax(before(kept_WV)), jax.nn.softmax(proposal.kept_BkV.reshape(-1, vocab))
    p_R, q_R = (jnp.take_along_axis(x_RV, proposed_R[:, None], axis=1)[:, 0] for x_RV in (p_RV, q_RV))
    rows, index_R = jax.tree.map(before, state), before(index_W)
    counts_R = sampling.uniform(rows, index_R, ACCEPTED) * q_R < p_R
    left_RV = jnp.maximum(p_RV - q_RV, 0)
    # Nothing is left of equal distributions: by rounding alone does a proposal not count then.
    left_RV = jnp.where(left_RV.any(axis=1, keepdims=True), left_RV, p_RV)
    left_R = sampling.draw(jnp.log(left_RV), rows, index_R, LEFT)
    tokens_R = jnp.where(counts_R, proposed_R, left_R)
    tokens_R = jnp.where(rows.temperature_B < sampling.GREEDY_BELOW, before(plain_W), tokens_R)
    last_B1 = plain_W.reshape(slots, drafts + 1)[:, drafts:]
    return jnp.concatenate([tokens_R.reshape(slots, drafts), last_B1], axis=1).reshape(-1)


def likely_or_drawn(
    kept_WV: jax.Array, state: SamplingState, index_W: jax.Array, drafts_Bk: jax.Array, tree: Ancestry,
    typical: Typical,
) -> jax.Array:  # fmt: skip
    """The token of each row by typical acceptance: along the longest path of proposed tokens that are likely enough
    the next one of the path, otherwise plain decoding's. In greedy rows the likeliest alone is likely enough.

    Args:
        kept_WV: see `sampling.kept`, for k + 1 rows of each slot.
        state, index_W: of the rows.

    Returns:
        int32 [W].
    """
    slots, rows, vocab = len(drafts_Bk), drafts_Bk.shape[1] + 1, kept_WV.shape[1]
    drawn_BQ = sampling.draw(kept_WV, state, index_W).reshape(slots, rows)
    logp_WV = jax.nn.log_softmax(kept_WV)
    entropy_W = -jnp.where(logp_WV > -jnp.inf, jnp.exp(logp_WV) * logp_WV, 0.0).sum(axis=1)
    least_BQ = jnp.minimum(typical.epsilon, typical.delta * jnp.exp(-entropy_W)).reshape(slots, rows)
    parent_Bk = jnp.broadcast_to(jnp.asarray(tree.parent_Bk), drafts_Bk.shape)
    slot_B1 = jnp.arange(slots, dtype=jnp.int32)[:, None]
    p_Bk = jnp.exp(logp_WV.reshape(slots, rows, vocab)[slot_B1, parent_Bk, drafts_Bk])
    greedy_B1 = (state.temperature_B < sampling.GREEDY_BELOW).reshape(slots, rows)[:, :1]
    right_Bk = jnp.where(
        greedy_B1, agreeing(drafts_Bk, drawn_BQ, tree), p_Bk > jnp.take_along_axis(least_BQ, parent_Bk, axis=1)
    )
    rows_Bd, count_B = walk(right_Bk, tree)
    place_1d = jnp.arange(1, rows_Bd.shape[1], dtype=jnp.int32)[None]
    before_Bd = jnp.where(place_1d < count_B[:, None], rows_Bd[:, :-1], rows)
    next_Bd = jnp.take_along_axis(drafts_Bk, jnp.maximum(rows_Bd[:, 1:] - 1, 0), axis=1)
    return drawn_BQ.at[slot_B1, before_Bd].set(next_Bd, mode="drop").reshape(-1)


def chain(drafts: int) -> Ancestry:
    """Of tokens each of which follows the one before."""
    return Tree(tuple(range(-1, drafts - 1))).ancestry

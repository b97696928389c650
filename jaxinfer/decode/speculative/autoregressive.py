"""Proposals that a model draws one after the other, as it would decode."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxinfer.decode import sampling
from jaxinfer.decode.batch import Batch, make_drafted, make_rectangle
from jaxinfer.decode.forward import Cache, Forward
from jaxinfer.decode.sampling import Needs, Sampled
from jaxinfer.decode.slots import SlotState, advance
from jaxinfer.decode.speculative.method import Proposal
from jaxinfer.model import Params

DRAWN = 1  # stream of proposals: what verifies them must not depend on their draws


def draft(
    forward: Forward, params: Params, cache: Cache, state: SlotState, needs: Needs, count: int, *, catch_up: bool,
    coupled: bool,
) -> tuple[Proposal, Cache]:  # fmt: skip
    """Lets a model decode `count` tokens of every active slot, with the requests' penalties and filters.

    Args:
        params, cache: the model's own.
        catch_up: whether the keys and values of the token before the newest may be missing: after a step in which all
            proposals were right those of the last one are, since nothing was drawn after it. They are computed again.
        coupled: draws with the noise of plain decoding, so that it is certain what is proposed. Otherwise draws are
            independent of the model's, and come with their probabilities.
    """
    one = replace(needs, logprobs=0)
    greedy = needs.level == "greedy"

    def step(state: SlotState, cache: Cache, batch: Batch, rows_W: jax.Array):
        ran = forward(params, cache, batch, rows_W)
        logits_WV = jax.sharding.reshard(ran.logits_WV, P(None, None))
        if greedy or coupled:
            kept_WV, sampled = None, sampling.sample(logits_WV, state.sampling, state.index_B, one)
        else:
            kept_WV = sampling.kept(logits_WV, state.sampling, state.index_B, one)
            tokens_W = sampling.draw(kept_WV, state.sampling, state.index_B, DRAWN)
            sampled = sampling.report(logits_WV, tokens_W, one)
        return _advanced(state, sampled, greedy), ran.cache, (sampled.tokens_W, kept_WV)

    def turn(carry, _):
        state, cache = carry
        batch, rows = make_rectangle(state, forward.page_size)
        state, cache, drawn = step(state, cache, batch, rows.tokens_W)
        return (state, cache), drawn

    first = _catching_up(state, forward.page_size) if catch_up else make_rectangle(state, forward.page_size)[0]
    every = 2 if catch_up else 1
    newest_B = every * jnp.arange(len(state.token_B), dtype=jnp.int32) + every - 1
    own = replace(state, text_BT=None)
    own, cache, drawn = step(own, cache, first, newest_B)
    (_, cache), rest = jax.lax.scan(turn, (own, cache), length=count - 1)
    joined = jax.tree.map(lambda x, more: jnp.moveaxis(jnp.concatenate([x[None], more]), 0, 1), drawn, rest)
    return Proposal(*joined), cache


def _catching_up(state: SlotState, page_size: int) -> Batch:
    """The newest token of each slot, and the one before it."""
    assert state.text_BT is not None
    before_B1 = jnp.maximum(state.length_B - 1, 0)[:, None]
    earlier_B = jnp.take_along_axis(state.text_BT, before_B1, axis=1)[:, 0]
    earlier = replace(state, token_B=earlier_B, length_B=before_B1[:, 0])
    return make_drafted(earlier, state.token_B[:, None], page_size)


def _advanced(state: SlotState, sampled: Sampled, greedy: bool) -> SlotState:
    """Counts of tokens stay as they are where no penalty reads them: they are large."""
    after = advance(state, sampled, state.active_B, state.length_B + 1)
    return replace(after, sampling=state.sampling) if greedy else after

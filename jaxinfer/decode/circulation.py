"""Decode steps in a pipe that does not drain between them.

With at least as many micro-batches as stages, the first one's next token is drawn when the last one has left the first
stage: it enters again at once. A loop of n steps of m micro-batches through p stages takes n m + p - 1 ticks, where
steps that drain the pipe take n (m + p - 1).

Between ticks all devices know what was drawn: head and sampling are outside the pipe, each device with its part of the
vocabulary. A tick's draw is thus shared by all stages, and none of them waits for the last one to make it.

Three kinds of steps still drain the pipe: those that verify proposals, of which all slots propose at once, those of a
method that is shown what leaves layers of several stages, and those with prompts, which are programs of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.decode.batch import Rows, make_rectangle
from jaxinfer.decode.forward import Cache, Forward
from jaxinfer.decode.sampling import Sampled
from jaxinfer.decode.slots import SlotState
from jaxinfer.model import Params, Round

# Draws for rows, from the state of their slots, logits, the rows, and what a method of speculation is shown of them.
Draw = Callable[[SlotState, jax.Array, Rows, jax.Array | None], tuple[SlotState, Sampled]]


def circulate(
    forward: Forward, draw: Draw, params: Params, state: SlotState, cache: Cache, steps: int
) -> tuple[SlotState, Cache, tuple[Sampled, jax.Array]]:  # fmt: skip
    """`steps` decode steps of each slot that is active.

    Returns:
        state and cache; of every step the draws and which of them count, with leading axes n and B.
    """
    model, own, slots = forward.model, forward.own(params), len(state.token_B)
    rounds = model.rounds(slots, steps)
    count, rows = rounds.microbatches, slots // rounds.microbatches
    groups_mt = jax.tree.map(lambda array_B: array_B.reshape(count, rows, *array_B.shape[1:]), state)

    def batch_of(told: tuple[SlotState, jax.Array], stage: jax.Array) -> Any:
        """What the layers of a stage need to know of its micro-batch; nothing of one that is none."""
        groups_mt, now = told
        return forward.scheduled(make_rectangle(_group(groups_mt, rounds, now - stage), forward.page_size)[0], model)

    def tick(carry: Any, now: jax.Array) -> tuple[Any, Any]:
        x_ptD, groups_mt, cache = carry
        entering_t = _group(groups_mt, rounds, now)
        tokens_t = jnp.where(entering_t.active_B, entering_t.token_B, 0)
        x_ptD, left_tD, cache = model.advance(own, x_ptD, tokens_t, batch_of, (groups_mt, now), cache)
        leaving = now - (model.stages - 1)
        group_t = _group(groups_mt, rounds, leaving)
        _, rows = make_rectangle(group_t, forward.page_size)
        after_t, sampled = draw(group_t, model.logits(own, left_tD), rows, left_tD)
        return (x_ptD, _put_back(groups_mt, rounds, leaving, after_t), cache), (sampled, rows.emits_W)

    x_ptD = model.empty_pipe(rows)
    now = jnp.arange(rounds.ticks, dtype=jnp.int32)
    (_, groups_mt, cache), drawn = jax.lax.scan(tick, (x_ptD, groups_mt, cache), now)
    state = jax.tree.map(lambda array_mt: array_mt.reshape(slots, *array_mt.shape[2:]), groups_mt)
    in_order = rounds.leaves_in().reshape(-1)  # of steps, then of slots

    def by_step(drawn_t: jax.Array) -> jax.Array:
        return drawn_t[in_order].reshape(steps, slots, *drawn_t.shape[2:])

    return state, cache, jax.tree.map(by_step, drawn)


def _group(groups_mt: SlotState, rounds: Round, since: jax.Array) -> SlotState:
    """The slots of the micro-batch that entered the first stage in tick `since`; none active where none did."""
    place, there = rounds.entered(since)
    group_t = jax.tree.map(lambda array_mt: jax.lax.dynamic_index_in_dim(array_mt, place, keepdims=False), groups_mt)
    return replace(group_t, active_B=group_t.active_B & there)


def _put_back(groups_mt: SlotState, rounds: Round, since: jax.Array, after_t: SlotState) -> SlotState:
    """The slots of all micro-batches after one of them has drawn."""
    place, there = rounds.entered(since)
    before_t = jax.lax.dynamic_index_in_dim(groups_mt.active_B, place, keepdims=False)
    after_t = replace(after_t, active_B=jnp.where(there, after_t.active_B, before_t))
    return jax.tree.map(
        lambda array_mt, array_t: jax.lax.dynamic_update_index_in_dim(array_mt, array_t, place, 0), groups_mt, after_t
    )

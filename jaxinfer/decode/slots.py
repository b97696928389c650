"""What a slot needs between steps, on the device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import batched
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.decode import sampling
from jaxinfer.decode.packing import Form, packed
from jaxinfer.decode.sampling import Sampled, SamplingState

# The most requests that one program gives slots to, and about the most words of their rows: of long ones, as where a
# method of speculation reads the text, fewer come at once. With 15 programs on their way to an H200 the host waits for
# the oldest before it starts another (JAX 0.11.2). With one for each prompt it came late to every step that began a
# dozen prompts, and 18 steps of 8,192 tokens took 60 ms longer; 256 prompts of one step now make 8 programs.
ADMITTED = 32
ADMITTED_WORDS = 2**16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotState:
    """One row per slot. A slot without a request is not active.

    Attributes:
        token_B: the newest token, which the next step reads.
        length_B: tokens whose keys and values are in the cache.
        index_B: tokens of the output so far.
        max_tokens_B: tokens of the output at which the slot stops.
        active_B: whether the slot decodes: its prompt is in the cache and its output has not ended.
        tables: page table of every cache group, [B, J].
        sampling: what the sampler keeps.
        text_BT: tokens of the prompt and the output, each at its position; None where nobody reads them.
        memory: what a method of speculation keeps, zeros in a slot of whose request nothing is computed; None for
            nothing.
    """

    token_B: jax.Array
    length_B: jax.Array
    index_B: jax.Array
    max_tokens_B: jax.Array
    active_B: jax.Array
    tables: tuple[jax.Array, ...]
    sampling: SamplingState
    text_BT: jax.Array | None = None
    memory: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Admission:
    """A request's row of `SlotState`, made on the host by `Programs.admission`.

    Attributes:
        tables: one row of page numbers for each cache group, filled with the null page.
        index: int32 scalar, tokens of the output so far.
        max_tokens: int32 scalar.
        sampling: from `sampling.pack`.
        prompt_T, output_T: tokens of the prompt and of the output so far, padded with -1; the sampler's penalties
            read them.
        text_T: the tokens of both together, padded with zeros; None where nobody reads them.
    """

    tables: tuple[np.ndarray, ...]
    index: np.ndarray
    max_tokens: np.ndarray
    sampling: dict[str, np.ndarray]
    prompt_T: np.ndarray
    output_T: np.ndarray
    text_T: np.ndarray | None = None


def empty_slots(
    slots: int, groups: int, pages_per_row: int, vocab: int, text: int | None = None, memory: Any = None
) -> SlotState:
    """No request anywhere. Filled on the host, so that nothing is compiled; no two arrays share memory.

    Args:
        text: tokens that are kept of each slot; None keeps none.
        memory: of a method of speculation, on the host.
    """
    zeros = lambda *shape: jnp.asarray(np.zeros(shape, np.int32))  # noqa: E731
    return SlotState(
        token_B=zeros(slots),
        length_B=zeros(slots),
        index_B=zeros(slots),
        max_tokens_B=zeros(slots),
        active_B=jnp.asarray(np.zeros(slots, np.bool_)),
        tables=tuple(zeros(slots, pages_per_row) for _ in range(groups)),
        sampling=sampling.empty(slots, vocab),
        text_BT=None if text is None else zeros(slots, text),
        memory=jax.tree.map(jnp.asarray, memory),
    )


def together(rows: Mapping[int, Admission], slots: int) -> Iterator[tuple[np.ndarray, np.ndarray, Form]]:
    """Rows of requests, by slot, in parts that one program each takes.

    Args:
        slots: how many there are.

    Yields:
        slots_A, one past the last slot pads; the bits of their rows, [A, U]; and what `unpacked` needs of one.
    """
    by_form = defaultdict[Form, list[tuple[int, np.ndarray]]](list)
    for slot, row in rows.items():
        bits_U, form = packed(row)
        by_form[form].append((slot, bits_U))
    for form, own in by_form.items():
        words = len(own[0][1])
        size = max(1, min(slots, ADMITTED, ADMITTED_WORDS // words))
        for part in batched(own, size):
            slots_A, bits_AU = np.full(size, slots, np.int32), np.zeros((size, words), np.uint32)
            slots_A[: len(part)], bits_AU[: len(part)] = zip(*part, strict=True)
            yield slots_A, bits_AU, form


def admit(state: SlotState, slots_A: jax.Array, rows: Admission) -> SlotState:
    """Gives slots to requests; each becomes active with its first token, at the end of its prefill.

    Args:
        slots_A: one past the last slot pads.
        rows: all arrays with a leading axis A.
    """
    put = partial(sampling.put, slots_A)
    return replace(
        state,
        length_B=put(state.length_B, 0),
        index_B=put(state.index_B, rows.index),
        max_tokens_B=put(state.max_tokens_B, rows.max_tokens),
        active_B=put(state.active_B, False),
        tables=tuple(put(table, new) for table, new in zip(state.tables, rows.tables, strict=True)),
        sampling=sampling.install(
            state.sampling, slots_A, rows.sampling, jnp.asarray(rows.prompt_T), jnp.asarray(rows.output_T)
        ),
        text_BT=None if state.text_BT is None else put(state.text_BT, rows.text_T),
        memory=jax.tree.map(lambda kept_B: put(kept_B, jnp.zeros_like(kept_B[0])), state.memory),
    )


def extend(tables: tuple[jax.Array, ...], entries_E4: jax.Array) -> tuple[jax.Array, ...]:
    """Writes entries of page tables.

    Args:
        tables: of every cache group, [B, J].
        entries_E4: cache group, slot, column and page of each; one past the last slot pads.
    """
    group_E, slot_E, column_E, page_E = entries_E4.T

    def written(group: int, table_BJ: jax.Array) -> jax.Array:
        own_E = jnp.where(group_E == group, slot_E, table_BJ.shape[0])
        return table_BJ.at[own_E, column_E].set(page_E, mode="drop")

    return tuple(written(group, table_BJ) for group, table_BJ in enumerate(tables))


def release(state: SlotState, slots_B: jax.Array) -> SlotState:
    """Stops slots from the host: a stop string was found, or the request was dropped. One past the last slot pads."""
    return replace(state, active_B=sampling.put(slots_B, state.active_B, False))


def taken(state: SlotState, slots_B: jax.Array) -> SlotState:
    """The state of some slots alone, in this order.

    Args:
        slots_B: one past the last slot stands for one that is not active.
    """
    slots = len(state.token_B)
    own = jax.tree.map(lambda array_B: array_B[jnp.minimum(slots_B, slots - 1)], state)
    return replace(own, active_B=own.active_B & (slots_B < slots))


def put_back(
    state: SlotState, slots_B: jax.Array, own: SlotState, tokens_nB: jax.Array, emits_nB: jax.Array
) -> SlotState:
    """The state with what steps changed of the slots that were `taken`.

    Args:
        tokens_nB, emits_nB: what each of them drew in each step, and whether it counts. To count the tokens again is
            little; to scatter rows of the vocabulary's length takes a GPU many milliseconds.
    """
    put = partial(sampling.put, slots_B)
    slots_nB = jnp.broadcast_to(slots_B, tokens_nB.shape)
    counts_BV = state.sampling.counts_BV.at[slots_nB, tokens_nB].add(emits_nB.astype(jnp.int32), mode="drop")
    return replace(
        state,
        token_B=put(state.token_B, own.token_B),
        length_B=put(state.length_B, own.length_B),
        index_B=put(state.index_B, own.index_B),
        active_B=put(state.active_B, own.active_B),
        sampling=replace(state.sampling, counts_BV=counts_BV),
        text_BT=None if state.text_BT is None else put(state.text_BT, own.text_BT),
        memory=jax.tree.map(put, state.memory, own.memory),
    )


def advance(state: SlotState, sampled: Sampled, emits_B: jax.Array, lengths_B: jax.Array) -> SlotState:
    """The state after a step: every slot that emits takes its token.

    Args:
        sampled: one choice per slot.
        emits_B: slots whose token counts; the others stay as they were.
        lengths_B: tokens in the cache after the step.
    """
    index_B = state.index_B + 1
    stops_B = (state.sampling.stop_ids_BZ == sampled.tokens_W[:, None]).any(axis=1)
    ended_B = stops_B | (index_B >= state.max_tokens_B)
    token_B = jnp.where(emits_B, sampled.tokens_W, state.token_B)
    return replace(
        state,
        token_B=token_B,
        length_B=jnp.where(emits_B, lengths_B, state.length_B),
        index_B=jnp.where(emits_B, index_B, state.index_B),
        active_B=jnp.where(emits_B, ~ended_B, state.active_B),
        sampling=sampling.count(state.sampling, token_B, emits_B),
        text_BT=None if state.text_BT is None else _written(state.text_BT, token_B, lengths_B, emits_B),
    )


def advance_several(state: SlotState, tokens_QB: jax.Array, wanted_B: jax.Array) -> tuple[SlotState, jax.Array]:
    """The state after each active slot took some tokens one after the other, as `advance` takes one: in few kernels,
    however many tokens there are.

    Args:
        tokens_QB: what was drawn, one after the other.
        wanted_B: how many of them count, if none before ends the output.

    Returns:
        the state, and which tokens count, bool [Q, B].
    """
    draw_Q1 = jnp.arange(len(tokens_QB), dtype=jnp.int32)[:, None]
    stops_QB = (state.sampling.stop_ids_BZ[None] == tokens_QB[:, :, None]).any(axis=2)
    ends_QB = stops_QB | (state.index_B[None] + draw_Q1 + 1 >= state.max_tokens_B[None])
    ended_QB = jnp.cumsum(ends_QB, axis=0, dtype=jnp.int32) > ends_QB.astype(jnp.int32)  # by a token before
    emits_QB = state.active_B[None] & (draw_Q1 < wanted_B[None]) & ~ended_QB
    taken_B = emits_QB.sum(axis=0, dtype=jnp.int32)
    last_1B = jnp.maximum(taken_B - 1, 0)[None]
    newest = lambda x_QB: jnp.take_along_axis(x_QB, last_1B, axis=0)[0]  # noqa: E731
    slots_QB = jnp.broadcast_to(jnp.arange(len(taken_B), dtype=jnp.int32), emits_QB.shape)
    counts_BV = state.sampling.counts_BV.at[slots_QB, tokens_QB].add(emits_QB.astype(jnp.int32))
    text_BT = state.text_BT
    if text_BT is not None:
        place_QB = jnp.where(emits_QB, state.length_B[None] + draw_Q1 + 1, text_BT.shape[1])
        text_BT = text_BT.at[slots_QB, place_QB].set(tokens_QB, mode="drop")
    after = replace(
        state,
        token_B=jnp.where(taken_B > 0, newest(tokens_QB), state.token_B),
        length_B=state.length_B + taken_B,
        index_B=state.index_B + taken_B,
        active_B=state.active_B & ~((taken_B > 0) & newest(ends_QB)),
        sampling=replace(state.sampling, counts_BV=counts_BV),
        text_BT=text_BT,
    )
    return after, emits_QB


def _written(text_BT: jax.Array, token_B: jax.Array, lengths_B: jax.Array, emits_B: jax.Array) -> jax.Array:
    """The texts with the newest tokens of the slots that emit: behind those that are in the cache."""
    slot_B, place_B = jnp.arange(len(token_B), dtype=jnp.int32), jnp.where(emits_B, lengths_B, text_BT.shape[1])
    return text_BT.at[slot_B, place_B].set(token_B, mode="drop")

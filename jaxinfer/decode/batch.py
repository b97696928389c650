"""The tokens of one step: slots that decode, then a ragged prefill, and how they see the cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.cache import NULL_PAGE, Pages, View, attend_pages, scheduled, tree_mask
from jaxinfer.decode.slots import SlotState
from jaxinfer.decode.tree import Ancestry
from jaxinfer.model.attention import Scores
from jaxinfer.parallel import deal_rows

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """What the model is given: `jaxinfer.model.attention.Attends` over pages.

    Attributes:
        tokens_T, positions_T: flat, what decodes first; with prompts among them spread over the axis `context`, where
            that has several devices, in the order of `jaxinfer.parallel.context.zigzag`.
        views: how the tokens see each cache group.
    """

    tokens_T: jax.Array
    positions_T: jax.Array
    views: tuple[View, ...]

    @property
    def has_prompts(self) -> bool:
        """Whether there may be prompts among the tokens."""
        return len(self.views[0].prefill_lengths_R) > 0

    def attend(
        self, q_TKgH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, state: Pages, group: int, scores: Scores,
        sinks_Kg: jax.Array | None,
    ) -> tuple[jax.Array, Pages]:  # fmt: skip
        return attend_pages(
            q_TKgH, k_TKH, v_TKH, state, self.views[group], scale=scores.scale, window=scores.window,
            soft_cap=scores.soft_cap, sinks_Kg=sinks_Kg,
        )  # fmt: skip

    def scheduled(
        self, q_NH: jax.ShapeDtypeStruct, page_SKH: jax.ShapeDtypeStruct, windows: tuple[int | None, ...],
        implementation: str,
    ) -> Batch:  # fmt: skip
        """With what the attention of a cache group's layers has in common; see `cache.scheduled`."""
        views = zip(self.views, windows, strict=True)
        shared = tuple(scheduled(view, q_NH, page_SKH, window, implementation) for view, window in views)
        return replace(self, views=shared)


@dataclass(frozen=True)
class StepInput:
    """What the host says of one step: which slots decode, and the next chunk of some prompts.

    The rows of the step are the slots that decode, one row each, then the chunks, then padding.

    Attributes:
        tokens_T: tokens of the chunks in their rows; those of slots that decode are on the device.
        slots_B: the slots that decode, in the order of their rows; one past the last slot pads.
        starts_R1: first row of each chunk and the end of the last; empty chunks pad. So many slots decode as there
            are rows before the first.
        slots_R: the slot of each chunk; one past the last slot pads.
        lengths_R: tokens of the prompt that are in the cache after the step.
        last_R: 1 where the chunk ends its prompt, so that the first token of the output is drawn.
    """

    tokens_T: Array
    slots_B: Array
    starts_R1: Array
    slots_R: Array
    lengths_R: Array
    last_R: Array

    def packed(self) -> np.ndarray:
        """One integer array, so that a step uploads once."""
        parts = (self.tokens_T, self.slots_B, self.starts_R1, self.slots_R, self.lengths_R, self.last_R)
        return np.concatenate([np.asarray(part, np.int32) for part in parts])

    @property
    def sizes(self) -> dict[str, int]:
        """What is static of it."""
        return {"tokens": len(self.tokens_T), "decode": len(self.slots_B)}

    @staticmethod
    def unpacked(packed: jax.Array, tokens: int, decode: int) -> StepInput:
        """The inverse of `packed`, for a step of `tokens` rows of which up to `decode` decode."""
        chunks = (packed.shape[0] - tokens - decode - 1) // 4
        sizes = np.cumsum([tokens, decode, chunks + 1, chunks, chunks])
        return StepInput(*jnp.split(packed, sizes))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What the sampler is told of every slot.

    Attributes:
        tokens_W: the slot's last row among the step's flat tokens; any row for a slot that has none.
        emits_W: whether the slot draws a token that counts.
        lengths_W: tokens in the slot's cache after the step.
    """

    tokens_W: jax.Array
    emits_W: jax.Array
    lengths_W: jax.Array


def make_batch(state: SlotState, step: StepInput, page_size: int) -> tuple[Batch, Rows]:
    """Lays out one step: one new token for each slot that decodes, then the chunks; the rows of all slots."""
    slots = len(state.token_B)
    chunk_T, position_T, valid_T = _place(step)
    own_B, own_R = (jnp.minimum(jnp.asarray(own), slots - 1) for own in (step.slots_B, step.slots_R))
    active_B = (step.slots_B < slots) & state.active_B[own_B]
    position_B = state.length_B[own_B]
    lengths_B = jnp.where(active_B, position_B + 1, 0)
    # Rows of slots that decode count as one more sequence, which sees nothing: their attention is of its own.
    decoding = jnp.zeros(1, jnp.int32)

    def over(chunk_T: jax.Array, decode_B: jax.Array) -> jax.Array:
        rows = len(decode_B)
        return chunk_T.at[:rows].set(jnp.where(active_B, decode_B, chunk_T[:rows]))

    def view(table_BJ: jax.Array) -> View:
        decode_B = _slot_index(table_BJ, own_B, position_B, active_B, page_size)
        chunks_T = _slot_index(table_BJ, own_R[chunk_T], position_T, valid_T, page_size)
        return View(
            write_T=over(chunks_T, decode_B),
            decode_tables_BJ=table_BJ[own_B],
            decode_lengths_B=lengths_B,
            prefill_tables_RJ=table_BJ[jnp.concatenate([decoding, own_R])],
            prefill_starts_R1=jnp.concatenate([decoding, step.starts_R1]),
            prefill_lengths_R=jnp.concatenate([decoding, step.lengths_R]),
        )

    batch = Batch(
        tokens_T=deal_rows(over(jnp.asarray(step.tokens_T), state.token_B[own_B])),
        positions_T=deal_rows(over(jnp.where(valid_T, position_T, 0), position_B)),
        views=tuple(view(table_BJ) for table_BJ in state.tables),
    )
    return batch, _rows(step, slots, active_B, lengths_B)


def _rows(step: StepInput, slots: int, active_B: Array, lengths_B: jax.Array) -> Rows:
    """The rows of all slots, of which those that decode are active, and have the lengths, as told."""
    row_B, last_R = jnp.arange(len(active_B), dtype=jnp.int32), jnp.maximum(step.starts_R1[1:] - 1, 0)
    zeros_W = jnp.zeros(slots, jnp.int32)

    def by_slot(decode_B: Array, chunk_R: Array) -> jax.Array:
        return zeros_W.at[step.slots_B].set(decode_B, mode="drop").at[step.slots_R].set(chunk_R, mode="drop")

    return Rows(
        tokens_W=by_slot(row_B, last_R),
        emits_W=by_slot(active_B.astype(jnp.int32), step.last_R) == 1,
        lengths_W=by_slot(lengths_B, step.lengths_R),
    )


def first_rows(step: StepInput, slots: int) -> jax.Array:
    """The first row of every slot in a step, int32 [B]; one past the last row for a slot that has none."""
    none_B = jnp.full(slots, len(step.tokens_T), jnp.int32)
    row_B, first_R = jnp.arange(len(step.slots_B), dtype=jnp.int32), jnp.asarray(step.starts_R1)[:-1]
    return none_B.at[step.slots_B].set(row_B, mode="drop").at[step.slots_R].set(first_R, mode="drop")


def make_rectangle(state: SlotState, page_size: int) -> tuple[Batch, Rows]:
    """Lays out a step in which each slot that is active decodes, without chunks."""
    active_B, position_B = state.active_B, state.length_B
    lengths_B, slots_B = jnp.where(active_B, position_B + 1, 0), jnp.arange(len(active_B), dtype=jnp.int32)

    def view(table_BJ: jax.Array) -> View:
        return _decode_view(table_BJ, _slot_index(table_BJ, slots_B, position_B, active_B, page_size), lengths_B)

    batch = Batch(
        tokens_T=jnp.where(active_B, state.token_B, 0),
        positions_T=jnp.where(active_B, position_B, 0),
        views=tuple(view(table_BJ) for table_BJ in state.tables),
    )
    return batch, Rows(slots_B, active_B, lengths_B)


def make_drafted(state: SlotState, drafts_Bk: jax.Array, page_size: int, tree: Ancestry | None = None) -> Batch:
    """Lays out a step of each slot that is active, without chunks: slot by slot its newest token, then those proposed
    to follow. Their keys are written in this order; of a tree, each has the position of its depth, and sees its path
    and the text before."""
    slots, queries = drafts_Bk.shape[0], drafts_Bk.shape[1] + 1
    flat = lambda x_BQ: jnp.broadcast_to(x_BQ, (slots, queries)).reshape(-1)  # noqa: E731
    slot_T = flat(jnp.arange(slots, dtype=jnp.int32)[:, None])
    active_T = state.active_B[slot_T]
    place_T = position_T = flat(state.length_B[:, None] + jnp.arange(queries, dtype=jnp.int32)[None])
    mask_BQW = None
    if tree is not None:
        position_T = flat(state.length_B[:, None] + tree.depth_BQ)
        mask_BQW = tree_mask(jnp.asarray(tree.seen_BQQ), slots)
    tokens_T = flat(jnp.concatenate([state.token_B[:, None], drafts_Bk], axis=1))
    lengths_B = jnp.where(state.active_B, state.length_B + queries, 0)

    def view(table_BJ: jax.Array) -> View:
        write_T = _slot_index(table_BJ, slot_T, place_T, active_T, page_size)
        return _decode_view(table_BJ, write_T, lengths_B, queries, mask_BQW)

    return Batch(
        tokens_T=jnp.where(active_T, tokens_T, 0),
        positions_T=jnp.where(active_T, position_T, 0),
        views=tuple(view(table_BJ) for table_BJ in state.tables),
    )


def accepted_moves(
    state: SlotState, rows_Bd: jax.Array, taken_B: jax.Array, page_size: int
) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """What brings the keys of accepted tokens of a tree to their places in the text.

    Args:
        state: of the slots before the step.
        rows_Bd: rows of the path that was taken; see `Ancestry`.
        taken_B: how many of these count.

    Returns:
        of every cache group where each key is and where it belongs, as `cache.move` takes it.
    """
    place_Bd = jnp.broadcast_to(jnp.arange(1, rows_Bd.shape[1], dtype=jnp.int32), rows_Bd[:, 1:].shape)
    slot_T = jnp.repeat(jnp.arange(len(rows_Bd), dtype=jnp.int32), place_Bd.shape[1])
    valid_T = (place_Bd < taken_B[:, None]).reshape(-1)

    def at(table_BJ: jax.Array, offset_Bd: jax.Array) -> jax.Array:
        place_T = (state.length_B[:, None] + offset_Bd).reshape(-1)
        return _slot_index(table_BJ, slot_T, place_T, valid_T, page_size)

    return tuple((at(table_BJ, rows_Bd[:, 1:]), at(table_BJ, place_Bd)) for table_BJ in state.tables)


def _decode_view(
    table_BJ: jax.Array, write_T: jax.Array, lengths_B: jax.Array, queries: int = 1,
    tree_mask_BQW: jax.Array | None = None,
) -> View:  # fmt: skip
    """Of a step without chunks."""
    return View(
        write_T=write_T,
        decode_tables_BJ=table_BJ,
        decode_lengths_B=lengths_B,
        prefill_tables_RJ=table_BJ[:0],
        prefill_starts_R1=jnp.zeros(1, jnp.int32),
        prefill_lengths_R=jnp.zeros(0, jnp.int32),
        queries=queries,
        tree_mask_BQW=tree_mask_BQW,
    )


def _place(step: StepInput) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For every row of the step: its chunk, its position in the sequence, and whether it is of a chunk at all."""
    starts_R1, lengths_R = jnp.asarray(step.starts_R1), jnp.asarray(step.lengths_R)
    row_T = jnp.arange(len(step.tokens_T), dtype=jnp.int32)
    # A search would be a loop, for whose every turn a GPU waits for the host.
    chunk_T = jnp.sum(row_T[:, None] >= starts_R1[None, 1:], axis=1, dtype=jnp.int32)
    chunk_T = jnp.minimum(chunk_T, len(lengths_R) - 1)
    position_T = lengths_R[chunk_T] - starts_R1[chunk_T + 1] + row_T
    return chunk_T, position_T, (row_T >= starts_R1[0]) & (row_T < starts_R1[-1])


def _slot_index(table_BJ, slots_T, position_T, valid_T, page_size: int) -> jax.Array:
    """Where each token is written: page x page size + slot in the page; what is not valid goes to the null page."""
    page_T = table_BJ[slots_T, jnp.where(valid_T, position_T // page_size, 0)]
    return jnp.where(valid_T, page_T * page_size + position_T % page_size, NULL_PAGE * page_size)

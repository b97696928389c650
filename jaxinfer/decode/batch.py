"""The tokens of one step: a decode rectangle of slots, then a ragged prefill, and how they see the cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.cache import NULL_PAGE, Pages, View, attend_pages, scheduled
from jaxinfer.decode.slots import SlotState
from jaxinfer.model.attention import Scores

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """What the model is given: `jaxinfer.model.attention.Attends` over pages.

    Attributes:
        tokens_T, positions_T: flat, the rectangle first.
        views: how the tokens see each cache group.
    """

    tokens_T: jax.Array
    positions_T: jax.Array
    views: tuple[View, ...]

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
class Prefill:
    """The ragged part of a step: the next chunk of some prompts, by the host's choice.

    Attributes:
        tokens_T: tokens, chunk after chunk, padded at the end.
        starts_R1: first row of each chunk and the end of the last; empty chunks pad.
        slots_R: the slot of each chunk; one past the last slot pads.
        lengths_R: tokens of the prompt that are in the cache after the step.
        last_R: 1 where the chunk ends its prompt, so that the first token of the output is drawn.
    """

    tokens_T: Array
    starts_R1: Array
    slots_R: Array
    lengths_R: Array
    last_R: Array

    def packed(self) -> np.ndarray:
        """One integer array, so that a step uploads once."""
        parts = (self.tokens_T, self.starts_R1, self.slots_R, self.lengths_R, self.last_R)
        return np.concatenate([np.asarray(part, np.int32) for part in parts])

    @staticmethod
    def unpacked(packed: jax.Array, tokens: int) -> Prefill:
        """The inverse of `packed`, for a prefill of `tokens` rows."""
        chunks = (packed.shape[0] - tokens - 1) // 4
        tokens_T, starts_R1, slots_R, lengths_R, last_R = jnp.split(
            packed, np.cumsum([tokens, chunks + 1, chunks, chunks])
        )
        return Prefill(tokens_T, starts_R1, slots_R, lengths_R, last_R)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The rows of a step that need logits: every slot of the rectangle, and the last token of every chunk.

    Attributes:
        tokens_W: index into the step's flat tokens.
        slots_W: the slot that the row's token goes to; one past the last slot pads.
        emits_W: whether the row's token counts.
        lengths_W: tokens in the slot's cache after the step.
    """

    tokens_W: jax.Array
    slots_W: jax.Array
    emits_W: jax.Array
    lengths_W: jax.Array

    def padded(self, count: int, no_slot: int) -> Rows:
        """With rows at the end that are of no slot."""
        fills = Rows(tokens_W=0, slots_W=no_slot, emits_W=False, lengths_W=0)  # pyright: ignore[reportArgumentType]
        return jax.tree.map(lambda array_W, fill: jnp.pad(array_W, (0, count), constant_values=fill), self, fills)


def make_batch(state: SlotState, decode: int, prefill: Prefill, page_size: int) -> tuple[Batch, Rows]:
    """Lays out one step: one new token for each of the first `decode` slots, then the prefill."""
    active_B, position_B = state.active_B[:decode], state.length_B[:decode]
    lengths_B = jnp.where(active_B, position_B + 1, 0)
    chunk_T, position_T, valid_T = _place(prefill)
    slots_R = jnp.minimum(prefill.slots_R, state.token_B.shape[0] - 1)

    def view(table_BJ: jax.Array) -> View:
        slots_B = jnp.arange(decode, dtype=jnp.int32)
        decode_B = _slot_index(table_BJ, slots_B, position_B, active_B, page_size)
        prefill_T = _slot_index(table_BJ, slots_R[chunk_T], position_T, valid_T, page_size)
        return View(
            write_T=jnp.concatenate([decode_B, prefill_T]),
            decode_tables_BJ=table_BJ[:decode],
            decode_lengths_B=lengths_B,
            prefill_tables_RJ=table_BJ[slots_R],
            prefill_starts_R1=jnp.asarray(prefill.starts_R1),
            prefill_lengths_R=jnp.asarray(prefill.lengths_R),
        )

    batch = Batch(
        tokens_T=jnp.concatenate([jnp.where(active_B, state.token_B[:decode], 0), prefill.tokens_T]),
        positions_T=jnp.concatenate([jnp.where(active_B, position_B, 0), jnp.where(valid_T, position_T, 0)]),
        views=tuple(view(table_BJ) for table_BJ in state.tables),
    )
    rows = Rows(
        tokens_W=jnp.concatenate([
            jnp.arange(decode, dtype=jnp.int32), decode + jnp.maximum(prefill.starts_R1[1:] - 1, 0)
        ]),
        slots_W=jnp.concatenate([jnp.arange(decode, dtype=jnp.int32), prefill.slots_R]),
        emits_W=jnp.concatenate([active_B, prefill.last_R == 1]),
        lengths_W=jnp.concatenate([lengths_B, prefill.lengths_R]),
    )  # fmt: skip
    return batch, rows


def no_prefill() -> Prefill:
    """A step that only decodes."""
    none = jnp.zeros(0, jnp.int32)
    return Prefill(none, jnp.zeros(1, jnp.int32), none, none, none)


def _place(prefill: Prefill) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For every row of the prefill: its chunk, its position in the sequence, and whether it is no padding."""
    chunks = prefill.slots_R.shape[0]
    row_T = jnp.arange(prefill.tokens_T.shape[0], dtype=jnp.int32)
    chunk_T = jnp.searchsorted(prefill.starts_R1[1:], row_T, side="right").astype(jnp.int32)
    chunk_T = jnp.minimum(chunk_T, max(chunks - 1, 0))
    if chunks == 0:
        return chunk_T, row_T, row_T < 0
    lengths_R, starts_R1 = jnp.asarray(prefill.lengths_R), jnp.asarray(prefill.starts_R1)
    position_T = lengths_R[chunk_T] - starts_R1[chunk_T + 1] + row_T
    return chunk_T, position_T, row_T < prefill.starts_R1[-1]


def _slot_index(table_BJ, slots_T, position_T, valid_T, page_size: int) -> jax.Array:
    """Where each token is written: page x page size + slot in the page; what is not valid goes to the null page."""
    page_T = table_BJ[slots_T, jnp.where(valid_T, position_T // page_size, 0)]
    return jnp.where(valid_T, page_T * page_size + position_T % page_size, NULL_PAGE * page_size)

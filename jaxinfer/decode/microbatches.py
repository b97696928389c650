"""A step's tokens as micro-batches of equally many rows, for the stages of a pipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxinfer.cache import View
from jaxinfer.decode.batch import Batch
from jaxinfer.model import Model


def divide(batch: Batch, scheduled: Callable[[Batch], Batch], model: Model) -> Batch:
    """Micro-batches of a step, in the order of its rows, with a leading axis of m + 1; the last one is idle: it writes
    to the null page, and reads nothing.

    A prompt whose rows lie in several of them is computed in chunks: each reads what those before it wrote. Slots
    that decode beside prompts are in the first micro-batches, where their rows are.

    Args:
        scheduled: gives a micro-batch what its layers have in common.
    """
    view, rows = batch.views[0], len(batch.tokens_T)
    slots = rows if batch.has_prompts else rows // view.queries
    count = model.microbatches(rows, slots)
    parts = [_part(batch, first, rows // count) for first in range(0, rows, rows // count)]
    idle = jax.tree.map(jnp.zeros_like, parts[0])
    return stacked([scheduled(part) for part in (*parts, idle)])


def stacked(batches: list[Batch]) -> Batch:
    """Batches of one form on a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)


def _part(batch: Batch, first: int, rows: int) -> Batch:
    """The micro-batch of so many rows from the `first` on."""
    own = slice(first, first + rows)
    views = tuple(_seen(view, first, rows) for view in batch.views)
    return Batch(tokens_T=batch.tokens_T[own], positions_T=batch.positions_T[own], views=views)


def _seen(view: View, first: int, rows: int) -> View:
    """What the rows of a micro-batch see: of the rectangle the slots that have them, of each prompt a chunk."""
    slots, own = len(view.decode_lengths_B), slice(first // view.queries, (first + rows) // view.queries)
    here = own.start < slots
    own = own if here else slice(0, rows // view.queries)  # slots of no row: they see nothing
    lengths_B = view.decode_lengths_B[own]
    ends_R = view.prefill_starts_R1[1:]
    starts_R1 = jnp.clip(view.prefill_starts_R1 - first, 0, rows)
    left_R = jnp.maximum(ends_R - first - rows, 0)  # rows of each prompt in the micro-batches that follow
    return replace(
        view,
        write_T=view.write_T[first : first + rows],
        decode_tables_BJ=view.decode_tables_BJ[own],
        decode_lengths_B=lengths_B if here else jnp.zeros_like(lengths_B),
        prefill_starts_R1=starts_R1,
        prefill_lengths_R=jnp.where(jnp.diff(starts_R1) > 0, jnp.maximum(view.prefill_lengths_R - left_R, 0), 0),
        tree_mask_BQW=None if view.tree_mask_BQW is None else view.tree_mask_BQW[own],
    )

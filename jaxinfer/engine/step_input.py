"""What a step computes, as its rows: slots that decode, then chunks of texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxinfer.decode.batch import StepInput
from jaxinfer.engine.sequence import Chunk


def lay_out(chunks: Sequence[Chunk], tokens: int, slots: int, decoding: Sequence[int] | None = None) -> StepInput:
    """A row for every slot that decodes, then the chunks one after the other, padded to `tokens` rows.

    Args:
        slots: of the engine, and so many chunks there may be.
        decoding: slots; None for a step in which none may.
    """
    row = 0 if decoding is None else len(decoding)
    step = StepInput(
        tokens_T=np.zeros(tokens, np.int32),
        slots_B=padded(decoding or (), 0 if decoding is None else min(slots, tokens), slots),
        starts_R1=np.full(slots + 1, row, np.int32),
        slots_R=np.full(slots, slots, np.int32),
        lengths_R=np.zeros(slots, np.int32),
        last_R=np.zeros(slots, np.int32),
    )
    for index, chunk in enumerate(chunks):
        step.tokens_T[row : row + chunk.tokens] = chunk.sequence.tokens[chunk.start : chunk.end]
        row += chunk.tokens
        step.slots_R[index] = chunk.sequence.slot
        step.lengths_R[index] = chunk.end
        step.last_R[index] = chunk.last
        step.starts_R1[index + 1] = row
    step.starts_R1[len(chunks) + 1 :] = row
    return step


def padded(decoding: Sequence[int], size: int, slots: int) -> np.ndarray:
    """Slots that decode, padded to `size`."""
    return np.array([*decoding, *[slots] * (size - len(decoding))], np.int32)


def next_tokens(chunks: Sequence[Chunk], tokens: int, first: int = 0) -> np.ndarray:
    """For each row the token that follows it, -1 where none is known.

    Args:
        first: row of the first chunk.
    """
    targets_T, row = np.full(tokens, -1, np.int32), first
    for chunk in chunks:
        following = chunk.sequence.tokens[chunk.start + 1 : chunk.end + 1]
        targets_T[row : row + len(following)] = following
        row += chunk.tokens
    return targets_T

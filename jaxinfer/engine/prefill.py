"""Chunks of texts as the ragged part of a step."""

from __future__ import annotations

import numpy as np

from jaxinfer.decode.batch import Prefill
from jaxinfer.engine.sequence import Chunk


def lay_out(chunks: list[Chunk], tokens: int, slots: int) -> Prefill:
    """Chunks one after the other, padded to `tokens` rows and `slots` chunks."""
    prefill = Prefill(
        tokens_T=np.zeros(tokens, np.int32),
        starts_R1=np.zeros(slots + 1, np.int32),
        slots_R=np.full(slots, slots, np.int32),
        lengths_R=np.zeros(slots, np.int32),
        last_R=np.zeros(slots, np.int32),
    )
    row = 0
    for index, chunk in enumerate(chunks):
        prefill.tokens_T[row : row + chunk.tokens] = chunk.sequence.tokens[chunk.start : chunk.end]
        row += chunk.tokens
        prefill.slots_R[index] = chunk.sequence.slot
        prefill.lengths_R[index] = chunk.end
        prefill.last_R[index] = chunk.last
        prefill.starts_R1[index + 1] = row
    prefill.starts_R1[len(chunks) + 1 :] = row
    return prefill


def next_tokens(chunks: list[Chunk], tokens: int) -> np.ndarray:
    """For each row of the ragged part the token that follows it, -1 where none is known."""
    targets_T, row = np.full(tokens, -1, np.int32), 0
    for chunk in chunks:
        following = chunk.sequence.tokens[chunk.start + 1 : chunk.end + 1]
        targets_T[row : row + len(following)] = following
        row += chunk.tokens
    return targets_T

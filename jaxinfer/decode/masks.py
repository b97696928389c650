"""Which tokens each slot may draw next, as bits: 32 tokens a word, the lowest bit first. Needs no device."""

from __future__ import annotations

import numpy as np

WORD = 32


def no_masks(slots: int, vocab: int) -> np.ndarray:
    """Words of slots that may draw every token, uint32 [B, U]."""
    return np.full((slots, -(-vocab // WORD)), 0xFFFFFFFF, np.uint32)

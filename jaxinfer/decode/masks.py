"""Which tokens may be drawn next, as bits: 32 tokens a word, the lowest bit first. Needs no device."""

from __future__ import annotations

import numpy as np

WORD = 32
NOTHING_BARRED = np.uint32(0xFFFFFFFF)  # a word that allows all of its tokens


def no_masks(rows: int, vocab: int) -> np.ndarray:
    """Words of draws that may be of every token, uint32 [W, U]."""
    return np.full((rows, -(-vocab // WORD)), NOTHING_BARRED, np.uint32)


def allows(words_U: np.ndarray, token: int) -> bool:
    """Whether a mask has a token."""
    return bool(words_U[token // WORD] >> np.uint32(token % WORD) & np.uint32(1))

"""Bits of the tokens that may be drawn."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode.masking import allowed
from jaxinfer.decode.masks import no_masks


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 104])
def test_each_token_has_its_bit(vocab):
    wanted_WV = np.random.default_rng(vocab).random((5, vocab)) < 0.5
    words_WU = np.zeros_like(no_masks(5, vocab))
    for row, token in zip(*np.nonzero(wanted_WV), strict=True):
        words_WU[row, token // 32] |= np.uint32(1) << np.uint32(token % 32)
    np.testing.assert_array_equal(allowed(jnp.asarray(words_WU), vocab), wanted_WV)


def test_no_mask_bars_nothing():
    assert allowed(jnp.asarray(no_masks(3, 70)), 70).all()

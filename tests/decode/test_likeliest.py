"""The likeliest tokens are found as a stable sort of all would find them."""

import jax
import numpy as np
import pytest

from jaxinfer.decode.likeliest import GROUP, likeliest

COUNT = 5
LEAST = COUNT * GROUP  # a vocabulary of more is not searched at once
find = jax.jit(likeliest, static_argnums=1)


@pytest.mark.parametrize("levels", [3, 40, 10**6])
@pytest.mark.parametrize("vocab", [COUNT, LEAST, LEAST + 1, LEAST + GROUP, 3 * LEAST + 7])
def test_as_a_stable_sort_finds_them(vocab, levels):
    """With many ties, few and none, and rows that have fewer tokens than are asked for."""
    rng = np.random.default_rng(levels)
    values_WV = rng.integers(-levels, 0, (16, vocab)).astype(np.float32)
    values_WV[1] = -np.inf
    values_WV[2:4, 2:] = -np.inf
    values_WV[4:8, : vocab // 2] = -np.inf
    ids_WL = np.argsort(-values_WV, axis=1, kind="stable")[:, :COUNT]
    found_WL, found_ids_WL = find(values_WV, COUNT)
    np.testing.assert_array_equal(found_ids_WL, ids_WL)
    np.testing.assert_array_equal(found_WL, np.take_along_axis(values_WV, ids_WL, axis=1))

"""The likeliest tokens are found as a stable sort of all would find them."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfer.decode.likeliest import GROUP, likeliest, likeliest_token
from jaxinfer.parallel import make_mesh

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


@pytest.mark.parametrize("devices", [1, 4])
def test_devices_find_the_likeliest_token_in_their_parts(devices):
    """The first of those that are equal, wherever they lie; a device may have none but what is barred."""
    rng = np.random.default_rng(devices)
    logits_WV = rng.integers(0, 4, (64, 16)).astype(np.float32)
    logits_WV[:9, 4:8] = -np.inf
    logits_WV[3] = -np.inf
    mesh = make_mesh(devices)
    placed_WV = jax.device_put(logits_WV, jax.NamedSharding(mesh, P(None, "tensor")))
    with jax.set_mesh(mesh):
        tokens_W = jax.jit(likeliest_token)(placed_WV)
    np.testing.assert_array_equal(tokens_W, logits_WV.argmax(axis=1))

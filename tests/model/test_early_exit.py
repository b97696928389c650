"""The first layers of a model are a model too, and `taps` tells what each layer left."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from tests.engine.tiny import CONFIG
from tests.model.dense import Dense, run

DEPTH = 4
FOUR_LAYERS = CONFIG | {"num_hidden_layers": DEPTH, "layer_types": ["sliding_attention", "full_attention"] * 2}
TOKENS = np.arange(12, dtype=np.int32) * 5


@pytest.fixture(scope="module")
def whole():
    model = Model(read_config(FOUR_LAYERS), make_mesh(1))
    return model, model.random_params(3)


def shallow(model: Model, params, depth: int):
    """A model that has the first layers only, with the embedding, norm and head of the whole."""
    small = Model(replace(model.config, layers=model.config.layers[:depth]), model.mesh)
    return small, small.params(dict(zip(model.parameters, params, strict=True)))


@pytest.mark.parametrize("depth", [1, 3])
def test_the_first_layers_equal_a_model_of_only_those(whole, depth):
    small, small_params = shallow(*whole, depth)
    early = run(*whole, TOKENS, layers=depth)
    alone = run(small, small_params, TOKENS)
    np.testing.assert_array_equal(early.logits_TV, alone.logits_TV)
    full = run(*whole, TOKENS)
    assert np.abs(full.logits_TV - early.logits_TV).max() > 0.1


def test_taps_are_what_each_layer_left(whole):
    taps = (2, 0, 3)
    tapped = run(*whole, TOKENS, taps=taps)
    assert len(tapped.taps) == len(taps)
    for layer, tap_TD in zip(taps, tapped.taps, strict=True):
        expected_TD = run(*whole, TOKENS, layers=layer + 1).hidden_TD
        # Another program of the same sums: roundings of numbers below 10.
        np.testing.assert_allclose(tap_TD, expected_TD, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(tapped.taps[-1], tapped.hidden_TD)


def test_layers_that_do_not_run_leave_their_state_alone(whole):
    model, params = whole
    cache = tuple(jnp.full(3, index, jnp.float32) for index in range(DEPTH))
    with jax.set_mesh(model.mesh):
        _, _, left = jax.jit(lambda cache: model.forward(params, Dense(jnp.asarray(TOKENS)), cache, layers=2))(cache)
    for index, state in enumerate(left):
        np.testing.assert_array_equal(state, np.full(3, index + (index < 2), np.float32))

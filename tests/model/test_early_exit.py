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
from tests.model.random_params import random_params

DEPTH = 3
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
THREE_LAYERS = CONFIG | {"num_hidden_layers": DEPTH, "layer_types": LAYERS}
TOKENS = np.arange(12, dtype=np.int32) * 5


@pytest.fixture(scope="module")
def whole():
    model = Model(read_config(THREE_LAYERS), make_mesh(1))
    return model, random_params(model, 3)


def shallow(model: Model, params, depth: int):
    """A model that has the first layers only, with the embedding, norm and head of the whole."""
    small = Model(replace(model.config, layers=model.config.layers[:depth]), model.mesh)
    return small, small.params(dict(zip(model.parameters, params, strict=True)))


def test_the_first_layers_equal_a_model_of_only_those(whole):
    depth = 2
    small, small_params = shallow(*whole, depth)
    early = run(*whole, TOKENS, layers=depth)
    alone = run(small, small_params, TOKENS)
    np.testing.assert_array_equal(early.logits_TV, alone.logits_TV)
    full = run(*whole, TOKENS)
    assert np.abs(full.logits_TV - early.logits_TV).max() > 0.1


def test_taps_are_what_each_layer_left(whole):
    tapped = run(*whole, TOKENS, taps=(1, 0, 2))
    second_TD, first_TD, last_TD = tapped.taps
    for depth, tap_TD in ((1, first_TD), (2, second_TD)):
        expected_TD = run(*whole, TOKENS, layers=depth).hidden_TD
        # Another program of the same sums: roundings of numbers below 10.
        np.testing.assert_allclose(tap_TD, expected_TD, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(last_TD, tapped.hidden_TD)


def test_layers_that_do_not_run_leave_their_state_alone(whole):
    model, params = whole
    cache = tuple(jnp.full(3, index, jnp.float32) for index in range(DEPTH))
    with jax.set_mesh(model.mesh):
        _, _, left = jax.jit(lambda cache: model.forward(params, Dense(jnp.asarray(TOKENS)), cache, layers=2))(cache)
    for index, state in enumerate(left):
        np.testing.assert_array_equal(state, np.full(3, index + (index < 2), np.float32))

"""A shape or dtype that an annotation does not allow raises under pytest, also where broadcasting would hide it."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from jaxinfer.cache import Pages, attend_pages
from jaxinfer.cache.store import write
from jaxinfer.decode import sampling
from jaxinfer.decode.prompt_logprobs import prompt_logprobs
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from tests.engine.tiny import CONFIG


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


POOL = Pages(floats(5, 4, 2, 8), floats(5, 4, 2, 8))
sample = partial(sampling.sample, needs=sampling.EVERYTHING)
score = partial(prompt_logprobs, top=1, chunk=8, transform=lambda logits: logits)
attend = partial(attend_pages, scale=1.0)


@pytest.fixture(scope="module")
def model():
    return Model(read_config(CONFIG), make_mesh())


@pytest.fixture(scope="module")
def state():
    return jax.eval_shape(lambda: sampling.empty(3, 8))


WRONG = {
    "a token index for one row alone": lambda state: (sample, floats(3, 8), state, ints(1)),
    "a token index that is no integer": lambda state: (sample, floats(3, 8), state, floats(3)),
    "logits in half precision": lambda state: (sample, jax.ShapeDtypeStruct((3, 8), jnp.float16), state, ints(3)),
    "logits of one row without its axis": lambda state: (sampling.truncate, floats(8), state),
    "hidden states of another size": lambda _: (score, floats(4, 6), floats(8, 5), ints(4)),
    "a target too few": lambda _: (score, floats(4, 6), floats(8, 6), ints(3)),
    "one value for all keys": lambda _: (write, POOL, ints(3), floats(3, 2, 8), floats(1, 2, 8)),
    "keys of one head for queries of two": lambda _: (
        attend, floats(3, 2, 2, 8), floats(3, 1, 8), floats(3, 1, 8), POOL, None
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_shape_raises(name, model, state):
    with pytest.raises(TypeCheckError), jax.set_mesh(model.mesh):
        jax.eval_shape(*WRONG[name](state))


def test_one_hidden_state_needs_its_axis(model):
    params = list(model.parameters.values())
    with pytest.raises(TypeCheckError), jax.set_mesh(model.mesh):
        jax.eval_shape(model.logits, params, floats(32))
    with jax.set_mesh(model.mesh):
        assert jax.eval_shape(model.logits, params, floats(4, 32)).shape == (4, CONFIG["vocab_size"])


def test_right_shapes_pass(model, state):
    assert jax.eval_shape(sample, floats(3, 8), state, ints(3)).tokens_W.shape == (3,)
    with jax.set_mesh(model.mesh):
        assert jax.eval_shape(score, floats(4, 6), floats(8, 6), ints(4)).logprob_T.shape == (4,)


def test_a_pytree_holds_whatever_is_mapped_over_it(state):
    assert replace(state, seed_B=None).seed_B is None
    assert jax.tree.map(lambda leaf: leaf.shape, state).counts_BV == (3, 8)

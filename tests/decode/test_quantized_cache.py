"""What an 8-bit cache does to a model's logits: just what its rounding of keys and values does."""

import functools
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache.quantized import LARGEST, quantize
from jaxinfer.model import Model, Params, read_config
from jaxinfer.parallel import make_mesh
from tests.decode.paged import paged_logits
from tests.engine.tiny import CONFIG
from tests.model.dense import Dense
from tests.model.random_params import random_params

CASES = [("int8", 1), ("float8_e4m3fn", 2)]
TOKENS = 60
TOKENS_T = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], TOKENS).astype(np.int32)


def tiny_model(devices: int = 1) -> tuple[Model, Params]:
    model = Model(read_config(CONFIG), make_mesh(devices))  # a window of 8, then all keys; two query heads share one
    return model, random_params(model, 3)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moved(Dense):
    """Plain attention. The state of a layer is what is added to its keys and values, and becomes their sum."""

    def attend(self, q_TKgH, k_TKH, v_TKH, state, *rest):
        k_TKH, v_TKH = k_TKH + state[0], v_TKH + state[1]
        return super().attend(q_TKgH, k_TKH, v_TKH, 0, *rest)[0], (k_TKH, v_TKH)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rounded(Dense):
    """Plain attention to keys and values as an 8-bit cache gives them back; they become the state of the layer."""

    def attend(self, q_TKgH, k_TKH, v_TKH, state, *rest):
        rounded = [rounded_to(x_TKH, state.dtype) for x_TKH in (k_TKH, v_TKH)]
        return super().attend(q_TKgH, *rounded, 0, *rest)[0], (k_TKH, v_TKH)


def rounded_to(x_TKH: jax.Array, dtype: jnp.dtype) -> jax.Array:
    values_TKH, scales_TK = quantize(x_TKH, dtype)
    return values_TKH.astype(jnp.float32) * scales_TK[..., None]


@partial(jax.jit, static_argnums=0)
def dense_logits(model: Model, params: Params, batch: Dense, states) -> tuple[jax.Array, tuple]:
    """[T, V], and the keys and values of every layer."""
    hidden_TD, _, states = model.forward(params, batch, states)
    return model.logits(params, hidden_TD), states


@functools.cache
def from_pages(dtype: str, devices: int) -> np.ndarray:
    return paged_logits(*tiny_model(devices), TOKENS_T, dtype)


@pytest.mark.parametrize(("dtype", "devices"), CASES)
def test_pages_hold_keys_and_values_rounded_once(dtype, devices):
    """Also those of the step itself: the logits are those of plain attention to rounded keys and values."""
    model, params = tiny_model()
    with jax.set_mesh(model.mesh):
        states = (jnp.zeros(0, dtype),) * model.config.num_layers
        expected_TV, _ = dense_logits(model, params, Rounded(jnp.asarray(TOKENS_T)), states)
    # Logits of size 1 in float32, summed in another order.
    np.testing.assert_allclose(from_pages(dtype, devices), expected_TV, rtol=0, atol=2e-5)


@functools.cache
def exact() -> tuple[np.ndarray, tuple, tuple]:
    """The last token's logits [V] of plain attention; the keys and values of every layer, [T, K, H] each; and the
    logits' derivatives by them, [V, T, K, H] each."""
    model, params = tiny_model()
    tokens_T = jnp.asarray(TOKENS_T)

    @jax.jit
    def last_logits(moves):
        return dense_logits(model, params, Moved(tokens_T), moves)[0][-1]

    with jax.set_mesh(model.mesh):
        still = jnp.zeros((TOKENS, model.kv_slots, model.config.head_size), jnp.float32)
        moves = ((still, still),) * model.config.num_layers
        logits_TV, kept = dense_logits(model, params, Moved(tokens_T), moves)
        return jax.device_get((logits_TV[-1], kept, jax.jacrev(last_logits)(moves)))


@pytest.mark.parametrize(("dtype", "devices"), CASES)
def test_logits_are_off_by_what_rounding_costs(dtype, devices):
    """To first order an error of a logit is the sum over all keys and values of its derivative by each, times that
    one's rounding. At most each is off by half a step, all in the worst direction. As a rule roundings are spread
    evenly over a step, and independent: their variance is a twelfth of its square."""
    exact_V, kept, derivatives = exact()
    steps = jax.tree.map(lambda x_TKH: step_of(x_TKH, dtype), kept)
    moved = jax.tree.map(lambda slope_VTKH, step_TKH: slope_VTKH * step_TKH, derivatives, steps)
    each = np.concatenate([part.reshape(len(part), -1) for part in jax.tree.leaves(moved)], axis=1)
    worst_V, usual = np.abs(each).sum(axis=1) / 2, np.sqrt((each**2).sum(axis=1).mean() / 12)

    error_V = from_pages(dtype, devices)[-1] - exact_V
    assert (np.abs(error_V) <= worst_V).all()
    assert 0.6 * usual < np.sqrt((error_V**2).mean()) < 1.4 * usual  # of some 32 independent ones


def step_of(x_TKH: np.ndarray, dtype: str) -> np.ndarray:
    """The distance of neighbours among the numbers that a component is rounded to."""
    scale_TK1 = np.abs(x_TKH).max(axis=2, keepdims=True) / LARGEST[dtype]
    if dtype == "int8":
        return np.broadcast_to(scale_TK1, x_TKH.shape)
    exponent_TKH = np.floor(np.log2(np.maximum(np.abs(x_TKH) / scale_TK1, 2.0**-6)))
    return scale_TK1 * 2.0 ** (exponent_TKH - 3)

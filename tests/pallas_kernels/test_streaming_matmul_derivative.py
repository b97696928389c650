"""The weight-streaming matmul can be differentiated: interpreted on the CPU, lowered at real shapes, and on a GPU."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.streaming_matmul import mosaic_gpu
from pallas_kernels.streaming_matmul.arguments import Arguments
from tests.pallas_kernels.draws import on_the_host
from tests.pallas_kernels.gpu_program import interpreted, lower
from tests.pallas_kernels.matmul_cases import F32, INTERPRETED, arguments, assert_close, call

DIFFERENTIATED = ("gated, in rounds", "groups of two experts", "parts, tokens of several owners")


def gradients(given: Arguments, run) -> list[np.ndarray]:
    """Of a weighted sum of the result, for every array but the experts."""
    weights = jax.random.normal(jax.random.key(7), jax.eval_shape(run, given).shape, F32)

    def loss(given: Arguments) -> jax.Array:
        return jnp.sum(run(given).astype(F32) * weights)

    found = jax.jit(jax.grad(loss, allow_int=True))(given)
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(replace(found, expert_A=None))]


def assert_gradients_agree(given: Arguments, found: list[np.ndarray]) -> None:
    """x, the product, its gradient and the result are each rounded to 8 bits: 2^-9 of their size on the mean."""
    for x, exact in zip(found, gradients(given, lambda given: call(given, "reference")), strict=True):
        assert np.linalg.norm(x - exact) <= 2.0**-7 * np.linalg.norm(exact)


@pytest.mark.parametrize("name", ["gated, in rounds", "groups of two experts"])
def test_the_kernel_has_a_derivative(name):
    case = INTERPRETED[name]
    given = arguments(case, on_the_host())
    with interpreted():
        found = gradients(given, lambda given: mosaic_gpu.streaming_matmul(given, config=case.config))
    assert_gradients_agree(given, found)


def test_a_tangent_goes_forward_too():
    case = INTERPRETED["output head"]
    given = arguments(case, on_the_host())
    with interpreted():
        y, tangent = jax.jit(
            lambda given: jax.jvp(
                lambda x: mosaic_gpu.streaming_matmul(replace(given, x=x), config=case.config), (given.x,), (given.x,)
            )
        )(given)
    assert_close(y, given)
    _, expected = jax.jvp(lambda x: call(replace(given, x=x), "reference"), (given.x,), (given.x,))
    assert np.linalg.norm(tangent - expected) <= 2.0**-7 * np.linalg.norm(y)


@pytest.mark.parametrize("name", [*DIFFERENTIATED, "three parts, two owners"])
def test_the_derivative_lowers(name):
    given = jax.eval_shape(lambda: arguments(replace(INTERPRETED[name], hidden=4096, outputs=4096)))
    loss = lambda given: jnp.sum(call(given, "mosaic_gpu").astype(F32))  # noqa: E731
    assert "mosaic_gpu" in lower(jax.value_and_grad(loss, allow_int=True), given)


@pytest.mark.gpu
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_on_a_gpu_it_has_a_derivative(name):
    case = INTERPRETED[name]
    given = arguments(case)
    assert_gradients_agree(
        given, gradients(given, lambda given: mosaic_gpu.streaming_matmul(given, config=case.config))
    )

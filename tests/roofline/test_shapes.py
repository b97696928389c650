"""The plan spreads a model over devices where the model itself does, and nowhere else."""

from typing import cast

import pytest
from jax.sharding import AbstractMesh, Mesh

from jaxinfer.model.config import MoEConfig
from jaxinfer.model.parameter import Shapes
from jaxinfer.parallel import TENSOR
from jaxinfer.roofline.shapes import check_tensor_parallel
from tests.roofline.small import small, sparse

# Sizes of which each alone refuses some number of devices that the others take.
SMALL = {
    "plain": small(),
    "odd vocabulary": small(vocab_size=510),
    "odd width": small(intermediate_size=190),
    "odd experts": small(layers=sparse(MoEConfig(6, 2, 64))),
    "experts alone": small(intermediate_size=190, layers=sparse(MoEConfig(8, 2, 64))[1:]),
    "experts that vary": small(layers=(*sparse(MoEConfig(4, 2, 64)), *sparse(MoEConfig(6, 2, 64)))),
    "three KV heads": small(num_heads=12, num_kv_heads=3, vocab_size=480),
}
TENSOR_PARALLEL = [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 32, 40, 64]


def refusal_of_the_model(config, devices: int) -> str:
    mesh = cast(Mesh, AbstractMesh((devices,), (TENSOR,)))  # more devices than are here; only their number is asked
    return refusal(Shapes(config, mesh).check)


def refusal(check, *arguments) -> str:
    try:
        check(*arguments)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("devices", TENSOR_PARALLEL)
@pytest.mark.parametrize("name", SMALL)
def test_small_models_spread_as_the_model_does(name, devices):
    planned = refusal(check_tensor_parallel, SMALL[name], devices)
    assert bool(planned) == bool(refusal_of_the_model(SMALL[name], devices)), planned


@pytest.mark.parametrize(
    ("name", "fitting"),
    [
        ("llama-3-8b", [1, 2, 4, 8, 16, 32]),
        ("llama-3-70b", [1, 2, 4, 8, 16, 32, 64]),
        ("llama-3.2-1b", [1, 2, 4, 8, 16, 32]),
        ("llama-2-13b", [1, 2, 4, 8]),
        ("mixtral-8x7b", [1, 2, 4, 8]),
        ("gemma-2-9b", [1, 2, 4, 8, 16]),
        ("qwen3-0.6b", [1, 2, 4, 8, 16]),
    ],
)
def test_published_models_spread_as_the_model_does(published, name, fitting):
    config = published(name)
    assert [n for n in TENSOR_PARALLEL if not refusal(check_tensor_parallel, config, n)] == fitting
    assert [n for n in TENSOR_PARALLEL if not refusal_of_the_model(config, n)] == fitting


@pytest.mark.parametrize(
    ("name", "devices", "rule"),
    [
        ("odd vocabulary", 4, "divide vocab_size 510"),
        ("odd width", 4, "divide intermediate_size 190"),
        ("odd experts", 4, "divide num_experts 6"),
        ("experts that vary", 4, "divide num_experts 6"),
        ("experts that vary", 8, "divide num_experts 4 and divide num_experts 6"),
        ("three KV heads", 2, "divide num_kv_heads 3 or be a multiple of it"),
        ("plain", 16, "divide num_heads 8"),
        ("plain", 0, "be at least 1"),
    ],
)
def test_the_size_that_does_not_spread_is_named(name, devices, rule):
    assert refusal(check_tensor_parallel, SMALL[name], devices) == f"tensor_parallel is {devices}; it must {rule}"


def test_every_number_of_experts_must_spread_in_the_model():
    told = refusal_of_the_model(SMALL["experts that vary"], 4)
    assert told == f"mesh axis {TENSOR} has 4 devices, which does not divide num_experts 6; [1, 2] would"
    assert not refusal_of_the_model(SMALL["experts that vary"], 2)

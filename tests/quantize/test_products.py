"""The products of the model as kernels, interpreted on one device, against float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfer.parallel import TENSOR, make_mesh
from jaxinfer.quantize import contract, gated_silu, project
from pallas_kernels import dispatch
from pallas_kernels.streaming_matmul import IMPLEMENTATIONS, mosaic_gpu
from pallas_kernels.tiled_matmul import config as tiled
from tests.pallas_kernels.gpu_program import interpreted
from tests.pallas_kernels.matmul_cases import SMALL, Case, arguments, assert_close

TOKENS, D, F = 3, 128, 192
MANY = 100
EPS = 1e-5


@dataclass(frozen=True)
class RMSNorm:
    scale_D: jax.Array
    plain: bool

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        x = x_TD.astype(jnp.float32)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + EPS) * self.scale_D[None]
        return x.astype(x_TD.dtype)

    @property
    def rms(self) -> tuple[jax.Array, float] | None:
        return (self.scale_D, EPS) if self.plain else None


@pytest.fixture
def kernels(monkeypatch) -> list[str | None]:
    """As on a Hopper GPU; each question that a product asked, by the kernel's refusal."""
    asked = []

    automatic = dispatch.automatic

    def asking(refusals: dispatch.Refusals) -> tuple[str, str]:
        asked.append(refusals[dispatch.KERNEL])
        return automatic(refusals)

    monkeypatch.setattr(dispatch, "compute_capability", lambda: dispatch.HOPPER)
    monkeypatch.setattr(dispatch, "automatic", asking)
    return asked


def run(function: Callable[..., jax.Array], *arrays: jax.Array | None) -> jax.Array:
    with jax.set_mesh(make_mesh()), interpreted():
        return jax.block_until_ready(jax.jit(function)(*arrays))


def test_project_takes_in_norm_and_bias(kernels):
    """The columns of a weight with several axes are in the order of the bias and of the result."""
    given = arguments(Case(TOKENS, "DN", SMALL, "norm bias", D, F))
    w_DKgH, bias_KgH = (array.reshape(*array.shape[:-1], 2, 3, 32) for array in (given.w, given.bias))

    def product(x_TD, w_DKgH, bias_KgH, scale_D):
        return project("TD,DKgH->TKgH", x_TD, w_DKgH, bias_KgH, RMSNorm(scale_D, plain=True))

    y_TKgH = run(product, given.x, w_DKgH, bias_KgH, given.norm_scale_D)
    assert y_TKgH.shape == (TOKENS, 2, 3, 32)
    assert set(kernels) == {None}
    assert_close(y_TKgH.reshape(TOKENS, F), given)


def test_a_norm_that_is_more_stands_before_the_product(kernels):
    given = arguments(Case(TOKENS, "DN", SMALL, "norm", D, F))
    normed = RMSNorm(given.norm_scale_D, plain=False)(given.x)
    y_TF = run(
        lambda x, w, scale_D: project("TD,DF->TF", x, w, norm=RMSNorm(scale_D, plain=False)),
        given.x,
        given.w,
        given.norm_scale_D,
    )
    assert kernels
    assert_close(y_TF, replace(given, x=normed, norm_scale_D=None))


def test_gated_silu_takes_in_norm_bias_and_gate(kernels):
    given = arguments(Case(TOKENS, "DcN", SMALL, "norm bias", D, F))

    def product(x_TD, w_DcF, bias_cF, scale_D):
        return gated_silu(x_TD, w_DcF, bias_cF, RMSNorm(scale_D, plain=True))

    assert_close(run(product, given.x, given.w, given.bias, given.norm_scale_D), given)
    assert set(kernels) == {None}


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_products_have_derivatives_on_several_devices(kernels, monkeypatch):
    """A layer's products, each as one kernel, against the same in plain jax.numpy. XLA stands in for the kernel, which
    is lowered too."""
    monkeypatch.setitem(IMPLEMENTATIONS, dispatch.KERNEL, IMPLEMENTATIONS[dispatch.FALLBACK])
    x_TD, scale_D = jax.random.normal(jax.random.key(3), (TOKENS, D), jnp.bfloat16), jnp.full((D,), 1.5, jnp.float32)
    up_DcF, down_FD = (
        jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) * jnp.bfloat16(D**-0.5)
        for seed, shape in enumerate([(D, 2, 2 * F), (2 * F, D)])
    )

    weights_TD = jax.random.normal(jax.random.key(2), (TOKENS, D), jnp.float32)

    def loss(arrays, plain: bool) -> jax.Array:
        x_TD, up_DcF, down_FD, scale_D = arrays
        norm = RMSNorm(scale_D, plain=True)
        if plain:
            y_TcF = jnp.einsum("TD,DcF->TcF", norm(x_TD), up_DcF)
            y_TD = x_TD + jax.nn.silu(y_TcF[:, 0]) * y_TcF[:, 1] @ down_FD
        else:
            y_TF = gated_silu(x_TD, up_DcF, None, norm)
            y_TD = contract("TF,FD->TD", y_TF, down_FD, None, x_TD)
        return jnp.sum(y_TD.astype(jnp.float32) * weights_TD)

    arrays = (x_TD, up_DcF, down_FD, scale_D)
    exact = jax.jit(jax.grad(partial(loss, plain=True)))([array.astype(jnp.float32) for array in arrays])
    with jax.set_mesh(make_mesh(2)):
        specs = (P(), P(None, None, TENSOR), P(TENSOR, None), P())
        placed = tuple(map(jax.sharding.reshard, arrays, specs))
        found = jax.jit(jax.grad(partial(loss, plain=False)))(placed)
    assert set(kernels) == {None}
    with jax.set_mesh(make_mesh(2)), monkeypatch.context() as patch:
        patch.setitem(IMPLEMENTATIONS, dispatch.KERNEL, mosaic_gpu.streaming_matmul)
        traced = jax.jit(jax.value_and_grad(partial(loss, plain=False))).trace(placed)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    # A dozen roundings to 8 bits of what a gradient is made of, 2^-9 of its size each.
    for x, y in zip(found, exact, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.linalg.norm(x - y) <= 12**0.5 * 2.0**-9 * np.linalg.norm(y)


def test_contract_takes_in_bias_and_residual(kernels):
    given = arguments(Case(TOKENS, "DN", SMALL, "bias residual", D, F))

    def product(x_TD, w_DF, bias_F, residual_TF):
        x_TD, w_DF = jax.sharding.reshard(x_TD, P(None, TENSOR)), jax.sharding.reshard(w_DF, P(TENSOR, None))
        return contract("TD,DF->TF", x_TD, w_DF, bias_F, residual_TF)

    y_TF = run(product, given.x, given.w, given.bias, given.residual_MN)
    assert_close(y_TF, given)
    assert set(kernels) == {None}


@pytest.fixture
def many(kernels, monkeypatch) -> list[str | None]:
    """So that small products are worth the kernel of many tokens."""
    monkeypatch.setattr(tiled, "LEAST_BUSY", 0.0)
    return kernels


def test_many_tokens_take_in_gate_and_residual(many):
    """What they do not take in stands beside them: a norm before, and a bias leaves the product to XLA."""
    gated, summed = (
        arguments(Case(MANY, "DcN", SMALL, "norm", D, 128)),
        arguments(Case(MANY, "DN", SMALL, "residual", D, 256)),
    )
    normed = RMSNorm(gated.norm_scale_D, plain=True)(gated.x)
    y_TF = run(lambda x, w, scale_D: gated_silu(x, w, norm=RMSNorm(scale_D, plain=True)), gated.x, gated.w,
               gated.norm_scale_D)  # fmt: skip
    assert_close(y_TF, replace(gated, x=normed, norm_scale_D=None))

    def product(x_TD, w_DF, residual_TF):
        x_TD, w_DF = jax.sharding.reshard(x_TD, P(None, TENSOR)), jax.sharding.reshard(w_DF, P(TENSOR, None))
        return contract("TD,DF->TF", x_TD, w_DF, None, residual_TF)

    assert_close(run(product, summed.x, summed.w, summed.residual_MN), summed)
    assert None in many

"""The products of the model as kernels, interpreted on one device, against float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfer.parallel import TENSOR, make_mesh
from jaxinfer.quantize import contract, gated_silu, project
from pallas_kernels import dispatch
from tests.pallas_kernels.gpu_program import interpreted
from tests.pallas_kernels.test_streaming_matmul import SMALL, Case, arguments, assert_close

TOKENS, D, F = 3, 128, 192
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


def test_contract_takes_in_bias_and_residual(kernels):
    given = arguments(Case(TOKENS, "DN", SMALL, "bias residual", D, F))

    def product(x_TD, w_DF, bias_F, residual_TF):
        x_TD, w_DF = jax.sharding.reshard(x_TD, P(None, TENSOR)), jax.sharding.reshard(w_DF, P(TENSOR, None))
        return contract("TD,DF->TF", x_TD, w_DF, bias_F, residual_TF)

    y_TF = run(product, given.x, given.w, given.bias, given.residual_MN)
    assert_close(y_TF, given)
    assert set(kernels) == {None}

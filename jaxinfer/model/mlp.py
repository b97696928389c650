"""The dense MLP, gated (Shazeer 2020, GLU variants) or plain."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.model.config import ModelConfig
from jaxinfer.model.norm import Norm
from jaxinfer.model.parameter import Shapes
from jaxinfer.parallel import TENSOR, goes_round
from jaxinfer.quantize import contract, gated_silu, mlp_ring, project


class MLP(nnx.Module):
    """[T, D] to [T, D]: residual + down(activation(up(norm(x)))); the norm and the residual may be missing."""

    def __init__(self, config: ModelConfig, shapes: Shapes):
        self.config = config
        halves, hidden, inner = 2 if config.gated_mlp else 1, config.hidden_size, config.intermediate_size
        self.up_DcF = shapes.param((hidden, halves, inner), (None, None, TENSOR))
        self.down_FD = shapes.param((inner, hidden), (TENSOR,))
        self.up_bias_cF = shapes.param((halves, inner), (None, TENSOR)) if config.mlp_bias else None
        self.down_bias_D = shapes.param((hidden,)) if config.mlp_bias else None

    def __call__(self, x_TD: jax.Array, norm: Norm | None = None, residual_TD: jax.Array | None = None) -> jax.Array:
        up_bias_cF = None if self.up_bias_cF is None else self.up_bias_cF[...]
        down_bias_D = None if self.down_bias_D is None else self.down_bias_D[...]
        if goes_round(x_TD):
            up, down = (self.up_DcF[...], up_bias_cF), (self.down_FD[...], down_bias_D)
            return mlp_ring(partial(activate, self.config), x_TD, up, down, norm, residual_TD)
        if self.config.activation == "silu" and self.config.gated_mlp:
            inner_TF = gated_silu(x_TD, self.up_DcF[...], up_bias_cF, norm)
        else:
            inner_TF = activate(self.config, project("TD,DcF->TcF", x_TD, self.up_DcF[...], up_bias_cF, norm))
        return contract("TF,FD->TD", inner_TF, self.down_FD[...], down_bias_D, residual_TD, x_TD)


def activate(config: ModelConfig, up_TcF: jax.Array) -> jax.Array:
    """[T, c, F] to [T, F]: the activation of the first half, times the second where the MLP is gated."""
    if config.activation == "swiglu_clamped":
        return _swiglu_clamped(up_TcF, config.activation_limit)
    gate_TF = {"silu": jax.nn.silu, "gelu": _gelu, "gelu_tanh": jax.nn.gelu}[config.activation](up_TcF[:, 0])
    return gate_TF * up_TcF[:, 1] if config.gated_mlp else gate_TF


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _swiglu_clamped(up_TcF: jax.Array, limit: float, alpha: float = 1.702) -> jax.Array:
    """gpt-oss: a sigmoid-gated linear unit of clamped inputs, with one added to the linear half."""
    gate, up = jnp.minimum(up_TcF[:, 0], limit), jnp.clip(up_TcF[:, 1], -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1.0)

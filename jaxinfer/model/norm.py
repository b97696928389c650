"""RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016), computed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.model.config import ModelConfig
from jaxinfer.model.parameter import Shapes
from jaxinfer.parallel import TENSOR


class Norm(nnx.Module):
    """The norm of a hidden state, as the config has it."""

    def __init__(self, config: ModelConfig, shapes: Shapes):
        self.config = config
        self.scale_D = shapes.param((config.hidden_size,))
        self.bias_D = shapes.param((config.hidden_size,)) if config.norm_bias else None

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        x = x_TD.astype(jnp.float32)
        if self.config.norm == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        x = rms_normalize(x, (-1,), self.config.norm_eps) * _neutral(self.config, self.scale_D)[None, :]
        if self.bias_D is not None:
            x = x + self.bias_D[...].astype(jnp.float32)[None, :]
        return x.astype(x_TD.dtype)

    @property
    def rms(self) -> tuple[jax.Array, float] | None:
        """The scale, as it is held, and epsilon of an RMSNorm that is nothing more: a product can take that in."""
        if self.config.norm != "rms" or self.config.norm_offset or self.bias_D is not None:
            return None
        return self.scale_D[...], self.config.norm_eps


def head_norm(config: ModelConfig, shapes: Shapes, heads: int) -> HeadNorm | AllHeadsNorm | None:
    """The norm of queries or of keys, where the config has one; `heads` of them are in a slot."""
    match config.qk_norm:
        case "head":
            return HeadNorm(config, shapes)
        case "all":
            return AllHeadsNorm(config, shapes, heads)
        case None:
            return None


class HeadNorm(nnx.Module):
    """RMSNorm of queries or keys over the head size: one scale that all heads share (Qwen3, Gemma 3)."""

    def __init__(self, config: ModelConfig, shapes: Shapes):
        self.config = config
        self.scale_H = shapes.param((config.head_size,))

    def __call__(self, x_TKgH: jax.Array) -> jax.Array:
        normed = rms_normalize(x_TKgH.astype(jnp.float32), (-1,), self.config.norm_eps)
        return (normed * _neutral(self.config, self.scale_H)[None, None, None, :]).astype(x_TKgH.dtype)


class AllHeadsNorm(nnx.Module):
    """RMSNorm over all heads of a token at once, with a scale per component (OLMo-2)."""

    def __init__(self, config: ModelConfig, shapes: Shapes, heads: int):
        self.config = config
        self.scale_KgH = shapes.param((shapes.kv_slots, heads, config.head_size), (TENSOR,))

    def __call__(self, x_TKgH: jax.Array) -> jax.Array:
        normed = rms_normalize(x_TKgH.astype(jnp.float32), (1, 2, 3), self.config.norm_eps)
        return (normed * _neutral(self.config, self.scale_KgH)[None]).astype(x_TKgH.dtype)


def rms_normalize(x: jax.Array, axes: tuple[int, ...], eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=axes, keepdims=True) + eps)


def _neutral(config: ModelConfig, scale: nnx.Param) -> jax.Array:
    return scale[...].astype(jnp.float32) + config.norm_offset

"""Rotary position embeddings (Su et al. 2021, RoFormer) and every scaling that Hugging Face configs use.

A scaling maps the base frequencies to others, once, when the model is built. Dynamic NTK and LongRoPE depend on the
length of the text; here they are fixed by the context that the engine serves, so that keys written early stay valid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Scaling(Protocol):
    """Maps base frequencies to scaled ones."""

    def __call__(self, rope: Rope, inverse: np.ndarray, context: int) -> tuple[np.ndarray, float]:
        """Scaled inverse frequencies (radians per position) and the factor of cos and sin."""
        ...


@dataclass(frozen=True)
class Rope:
    """theta: base of the frequencies; dim: how many of a head's leading components rotate, an even number."""

    theta: float
    dim: int
    scaling: Scaling | None = None

    def frequencies(self, context: int) -> tuple[np.ndarray, float]:
        """Inverse frequencies (dim / 2, float32) and the factor of cos and sin, for texts up to `context`."""
        inverse = _inverse_frequencies(self.theta, self.dim)
        if self.scaling is None:
            return inverse, 1.0
        scaled, factor = self.scaling(self, inverse, context)
        return scaled.astype(np.float32), factor


def _inverse_frequencies(theta: float, dim: int) -> np.ndarray:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1.0) / np.float32(theta) ** exponents


@dataclass(frozen=True)
class Linear:
    """Position interpolation (Chen et al. 2023): positions divided by `factor`."""

    factor: float

    def __call__(self, rope, inverse, context):
        return inverse / np.float32(self.factor), 1.0


@dataclass(frozen=True)
class Dynamic:
    """Dynamic NTK scaling: the base grows with the context once it passes `original_context`."""

    factor: float
    original_context: int

    def __call__(self, rope, inverse, context):
        if rope.dim < 4:  # the base grows by a power of dim / (dim - 2)
            raise ValueError(f"dynamic scaling of {rope.dim} rotating components (head_dim); expected at least 4")
        length = max(context, self.original_context)
        growth = self.factor * length / self.original_context - (self.factor - 1)
        return _inverse_frequencies(rope.theta * growth ** (rope.dim / (rope.dim - 2)), rope.dim), 1.0


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, with a ramp between them."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __call__(self, rope, inverse, context):
        turns = self.original_context * inverse / (2 * math.pi)
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        return keep * inverse + (1 - keep) * inverse / self.factor, 1.0


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023, section 3.2 and 3.4): interpolate slow dimensions, keep fast ones, scale attention."""

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __call__(self, rope, inverse, context):
        low, high = self._dimension(rope, self.beta_fast), self._dimension(rope, self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.dim - 1)
        span = high - low if high != low else 0.001
        ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - low) / span, 0, 1)
        return ramp * inverse / self.factor + (1 - ramp) * inverse, self._attention_factor()

    def _dimension(self, rope: Rope, turns: float) -> float:
        """The dimension whose component turns `turns` times over the original context."""
        ratio = self.original_context / (turns * 2 * math.pi)
        return rope.dim * math.log(ratio) / (2 * math.log(rope.theta))

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    def _magnitude(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class LongRope:
    """LongRoPE (Ding et al. 2024): a searched factor per dimension, one set for short contexts and one for long.

    Each set has dim / 2 factors.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_context: int
    factor: float  # how far the context was extended
    attention_factor: float | None = None

    def __call__(self, rope, inverse, context):
        chosen = self.long_factor if context > self.original_context else self.short_factor
        return inverse / np.asarray(chosen, np.float32), self._attention_factor()

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_context))


def tables(rope: Rope, positions_T: jax.Array, context: int) -> tuple[jax.Array, jax.Array]:
    """cos_Tr and sin_Tr (float32, r = dim / 2 angles) at the given positions."""
    inverse, factor = rope.frequencies(context)
    angles_Tr = positions_T.astype(jnp.float32)[:, None] * jnp.asarray(inverse)[None, :]
    return jnp.cos(angles_Tr) * factor, jnp.sin(angles_Tr) * factor


def rotate(x_TXH: jax.Array, cos_Tr: jax.Array, sin_Tr: jax.Array) -> jax.Array:
    """Rotates the leading 2r components of every head; component i pairs with i + r, as in Llama.

    `x_TXH` may carry any number of axes between tokens and head size.
    """
    half = cos_Tr.shape[-1]
    shape = (cos_Tr.shape[0], *(1,) * (x_TXH.ndim - 1), half)
    x = x_TXH.astype(jnp.float32)
    # Each half times cos, and the other one times sin: without a concatenation XLA fuses this into what takes the
    # result, the padding of the queries and the write of the keys.
    pairs_TX2r = x[..., : 2 * half].reshape(*x.shape[:-1], 2, half)
    sign_2r = jnp.array([[-1.0], [1.0]]).reshape(*(1,) * (x.ndim - 1), 2, 1)
    turned = pairs_TX2r * cos_Tr.reshape(shape) + pairs_TX2r[..., ::-1, :] * (sign_2r * sin_Tr.reshape(shape))
    turned = turned.reshape(*x.shape[:-1], 2 * half)
    if 2 * half < x.shape[-1]:
        turned = jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)
    return turned.astype(x_TXH.dtype)

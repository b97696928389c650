"""Multi-head, grouped-query and multi-query attention: one fused projection, one seam to the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxinfer.model.config import ModelConfig
from jaxinfer.model.norm import Norm, head_norm
from jaxinfer.model.parameter import Shapes
from jaxinfer.model.rope import rotate
from jaxinfer.parallel import TENSOR, row_axis
from jaxinfer.quantize import contract, project


@dataclass(frozen=True)
class Scores:
    """How scores become weights: static, and the same for every token of a layer."""

    scale: float
    window: int | None
    soft_cap: float | None


@runtime_checkable
class Attends(Protocol):
    """What the model needs of a step, as a pytree: the tokens, their positions, and attention over what came before
    them."""

    @property
    def tokens_T(self) -> jax.Array: ...

    @property
    def positions_T(self) -> jax.Array: ...

    def attend(
        self, q_TKgH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, state: Any, group: int, scores: Scores,
        sinks_Kg: jax.Array | None,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """The attention output (shape of q) and the layer's new state."""
        ...


class Attention(nnx.Module):
    """[T, D] to [T, D]: residual + attention(norm(x)), either may be missing; keys and values go to the state.

    In two parts, since a kernel may take the second one in: `heads`, and `output`, their projection.
    """

    def __init__(self, config: ModelConfig, index: int, shapes: Shapes):
        self.config, self.layer, self.group = config, config.layers[index], config.group(index)
        slots, queries, size = shapes.kv_slots, shapes.queries_per_slot, config.head_size
        self.qkv_DKgH = shapes.param((config.hidden_size, slots, queries + 2, size), (None, TENSOR))
        self.qkv_bias_KgH = shapes.param((slots, queries + 2, size), (TENSOR,)) if config.qkv_bias else None
        self.o_MD = shapes.param((config.num_heads * size, config.hidden_size), (TENSOR,))
        self.o_bias_D = shapes.param((config.hidden_size,)) if config.o_bias else None
        self.sinks_Kg = shapes.param((slots, queries), (TENSOR,)) if config.sinks else None
        self.q_norm, self.k_norm = head_norm(config, shapes, queries), head_norm(config, shapes, 1)

    def heads(
        self, x_TD: jax.Array, batch: Attends, state: Any, rope, norm: Norm | None = None
    ) -> tuple[jax.Array, Any]:
        """The outputs of all heads in a row, [T, M], and the layer's new state."""
        q_TKgH, k_TKH, v_TKH = self._project(x_TD, norm)
        cos_Tr, sin_Tr = rope
        scores = Scores(self.config.scale, self.layer.window, self.config.attention_soft_cap)
        sinks_Kg = None if self.sinks_Kg is None else self.sinks_Kg[...]
        with jax.named_scope("attention"):
            q_TKgH, k_TKH = rotate(q_TKgH, cos_Tr, sin_Tr), rotate(k_TKH, cos_Tr, sin_Tr)
            out_TKgH, state = batch.attend(q_TKgH, k_TKH, v_TKH, state, self.group, scores, sinks_Kg)
        return jnp.reshape(out_TKgH, (x_TD.shape[0], -1), out_sharding=P(row_axis(out_TKgH), TENSOR)), state

    def _project(self, x_TD: jax.Array, norm: Norm | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        bias_KgH = None if self.qkv_bias_KgH is None else self.qkv_bias_KgH[...]
        qkv_TKgH = project("TD,DKgH->TKgH", x_TD, self.qkv_DKgH[...], bias_KgH, norm)
        q_TKgH, k_TKH, v_TKH = qkv_TKgH[:, :, :-2], qkv_TKgH[:, :, -2:-1], qkv_TKgH[:, :, -1]
        if self.q_norm is not None and self.k_norm is not None:
            q_TKgH, k_TKH = self.q_norm(q_TKgH), self.k_norm(k_TKH)
        k_TKH = k_TKH[:, :, 0]
        if (limit := self.config.clip_qkv) is not None:
            q_TKgH, k_TKH, v_TKH = (jnp.clip(y, -limit, limit) for y in (q_TKgH, k_TKH, v_TKH))
        return q_TKgH, k_TKH, v_TKH

    def output(
        self, heads_TM: jax.Array, residual_TD: jax.Array | None = None, like_TD: jax.Array | None = None
    ) -> jax.Array:
        """`like_TD` as in `contract`."""
        o_bias_D = None if self.o_bias_D is None else self.o_bias_D[...]
        return contract("TM,MD->TD", heads_TM, self.o_MD[...], o_bias_D, residual_TD, like_TD)

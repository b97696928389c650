"""How one of our parameters is made of published tensors, and how it is taken apart again.

Published matrices are stored [out, in], one for each projection; ours are stored [in, out], fused, with heads and
halves as axes of their own. `join` and `split` are inverse to each other, so the shapes that a checkpoint must
have follow from the shapes of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jaxinfer.model import ModelConfig

Array = jax.Array | np.ndarray


@dataclass(frozen=True)
class Sizes:
    """What a form must know of a model. Two models of the same sizes share their compiled joins."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    gated_mlp: bool

    @classmethod
    def of(cls, config: ModelConfig) -> Sizes:
        return cls(config.num_heads, config.num_kv_heads, config.head_size, config.gated_mlp)


@dataclass(frozen=True)
class Form:
    """A bijection between some published tensors and one parameter, in the layout of a single device.

    Attributes:
        join: (sizes, published tensors...) to the parameter. Given the same share of every tensor, it gives that
            share of the parameter, unless `shard_axis` is None.
        split: (sizes, parameter) to the published tensors, in the same order.
        shard_axis: the axis of every published tensor that a shard of the parameter is a range of; None where a
            shard is scattered over a tensor.
        per_expert: the tensors are those of expert 0, then those of expert 1, and so on.
    """

    join: Callable[..., jax.Array]
    split: Callable[[Sizes, Array], tuple[Array, ...]]
    shard_axis: int | None
    per_expert: bool = False


def _same(sizes: Sizes, x: jax.Array) -> jax.Array:
    return x


def _one(sizes: Sizes, x: Array) -> tuple[Array]:
    return (x,)


SAME = Form(_same, _one, shard_axis=0)


def _transpose(sizes: Sizes, w: jax.Array) -> jax.Array:
    return w.T


def _transpose_one(sizes: Sizes, w: Array) -> tuple[Array]:
    return (w.T,)


TRANSPOSED = Form(_transpose, _transpose_one, shard_axis=1)


# Queries, keys and values: rows of heads, [heads x head size, in] for a weight and [heads x head size] for a bias.


def _join_rows(sizes: Sizes, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """KgH... of the rows of queries, keys and values: g = the queries of a KV head, its key, its value."""
    group = sizes.num_heads // sizes.num_kv_heads
    parts = [
        rearrange(x, "(K g H) ... -> K g H ...", g=heads, H=sizes.head_size)
        for x, heads in ((q, group), (k, 1), (v, 1))
    ]
    return jnp.concatenate(parts, axis=1)


def _split_rows(sizes: Sizes, qkv: Array) -> tuple[Array, ...]:
    parts = (qkv[:, :-2], qkv[:, -2:-1], qkv[:, -1:])
    return tuple(rearrange(x, "K g H ... -> (K g H) ...") for x in parts)


def _join_qkv(sizes: Sizes, q_MD: jax.Array, k_OD: jax.Array, v_OD: jax.Array) -> jax.Array:
    return rearrange(_join_rows(sizes, q_MD, k_OD, v_OD), "K g H D -> D K g H")


def _split_qkv(sizes: Sizes, qkv_DKgH: Array) -> tuple[Array, ...]:
    return _split_rows(sizes, rearrange(qkv_DKgH, "D K g H -> K g H D"))


def _join_fused_qkv(sizes: Sizes, rows_OD: jax.Array) -> jax.Array:
    """Phi-3, and Falcon with its single KV head: all queries, then all keys, then all values."""
    keys = sizes.num_heads * sizes.head_size
    values = keys + sizes.num_kv_heads * sizes.head_size
    return _join_qkv(sizes, rows_OD[:keys], rows_OD[keys:values], rows_OD[values:])


def _split_fused_qkv(sizes: Sizes, qkv_DKgH: Array) -> tuple[Array]:
    return (jnp.concatenate(_split_qkv(sizes, qkv_DKgH)),)


QKV = Form(_join_qkv, _split_qkv, shard_axis=0)
QKV_BIAS = Form(_join_rows, _split_rows, shard_axis=0)
FUSED_QKV = Form(_join_fused_qkv, _split_fused_qkv, shard_axis=None)


def _join_query_scale(sizes: Sizes, scale_M: jax.Array) -> jax.Array:
    return rearrange(scale_M, "(K g H) -> K g H", g=sizes.num_heads // sizes.num_kv_heads, H=sizes.head_size)


def _join_key_scale(sizes: Sizes, scale: jax.Array) -> jax.Array:
    return rearrange(scale, "(K g H) -> K g H", g=1, H=sizes.head_size)


def _split_scale(sizes: Sizes, scale_KgH: Array) -> tuple[Array]:
    return (rearrange(scale_KgH, "K g H -> (K g H)"),)


def _join_sinks(sizes: Sizes, sinks_N: jax.Array) -> jax.Array:
    return rearrange(sinks_N, "(K g) -> K g", g=sizes.num_heads // sizes.num_kv_heads)


def _split_sinks(sizes: Sizes, sinks_Kg: Array) -> tuple[Array]:
    return (rearrange(sinks_Kg, "K g -> (K g)"),)


QUERY_SCALE = Form(_join_query_scale, _split_scale, shard_axis=0)
KEY_SCALE = Form(_join_key_scale, _split_scale, shard_axis=0)
SINKS = Form(_join_sinks, _split_sinks, shard_axis=0)


# The up projection of an MLP: gate and up, or up alone.


def _join_up(sizes: Sizes, *halves_FD: jax.Array) -> jax.Array:
    return rearrange(list(halves_FD), "c F D -> D c F")


def _split_up(sizes: Sizes, up_DcF: Array) -> tuple[Array, ...]:
    return tuple(rearrange(up_DcF, "D c F -> c F D"))


def _join_fused_up(sizes: Sizes, up_OD: jax.Array) -> jax.Array:
    return rearrange(up_OD, "(c F) D -> D c F", c=2)


def _split_fused_up(sizes: Sizes, up_DcF: Array) -> tuple[Array]:
    return (rearrange(up_DcF, "D c F -> (c F) D"),)


def _stack(sizes: Sizes, *halves_F: jax.Array) -> jax.Array:
    return jnp.stack(halves_F)


def _unstack(sizes: Sizes, up_cF: Array) -> tuple[Array, ...]:
    return tuple(up_cF)


UP = Form(_join_up, _split_up, shard_axis=0)
FUSED_UP = Form(_join_fused_up, _split_fused_up, shard_axis=None)
UP_BIAS = Form(_stack, _unstack, shard_axis=0)


# Experts: a tensor for each expert, or, in gpt-oss, all experts in one, stored [in, out] with gate and up interleaved.


def _join_experts_up(sizes: Sizes, *halves_FD: jax.Array) -> jax.Array:
    return rearrange(list(halves_FD), "(E c) F D -> E D c F", c=2 if sizes.gated_mlp else 1)


def _split_experts_up(sizes: Sizes, up_EDcF: Array) -> tuple[Array, ...]:
    return tuple(rearrange(up_EDcF, "E D c F -> (E c) F D"))


def _join_experts_down(sizes: Sizes, *down_DF: jax.Array) -> jax.Array:
    return rearrange(list(down_DF), "E D F -> E F D")


def _split_experts_down(sizes: Sizes, down_EFD: Array) -> tuple[Array, ...]:
    return tuple(rearrange(down_EFD, "E F D -> E D F"))


def _join_interleaved(sizes: Sizes, up: jax.Array) -> jax.Array:
    return rearrange(up, "E ... (F c) -> E ... c F", c=2)


def _split_interleaved(sizes: Sizes, up: Array) -> tuple[Array]:
    return (rearrange(up, "E ... c F -> E ... (F c)"),)


EXPERTS_UP = Form(_join_experts_up, _split_experts_up, shard_axis=0, per_expert=True)
EXPERTS_DOWN = Form(_join_experts_down, _split_experts_down, shard_axis=0, per_expert=True)
INTERLEAVED_UP = Form(_join_interleaved, _split_interleaved, shard_axis=0)

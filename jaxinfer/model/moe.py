"""Mixture of experts (Shazeer et al. 2017; Jiang et al. 2024, Mixtral).

Decoding reads weights, so with few tokens only the experts that they chose are read, one product per choice. With
many tokens nearly every expert is read anyway; then the tokens are grouped by expert, and one product serves up to a
tile of tokens of one expert (Gale et al. 2023, MegaBlocks).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.model.config import ModelConfig, MoEConfig
from jaxinfer.model.mlp import activate
from jaxinfer.model.norm import Norm
from jaxinfer.model.parameter import Shapes
from jaxinfer.parallel import TENSOR, all_tokens, exchange_experts, exchanges_tokens, expert_parallel
from jaxinfer.quantize import einsum, reduce_einsum

Stacks = dict[str, jax.Array]  # "up", "down" and perhaps their biases, of every expert held or of one

# One product per choice is unrolled; more choices than this are grouped instead.
FEW_CHOICES = 16
# Rows of one product where tokens are grouped: no more than experts have on average, so that (on one device) at most
# about half of them are padding, but at least the smallest. With the largest, a product of 16-bit weights does 256
# operations for each byte of them: more than an H200 does in the time that it reads one.
SMALLEST_TILE, LARGEST_TILE = 8, 256


class MoE(nnx.Module):
    def __init__(self, config: ModelConfig, moe: MoEConfig, shapes: Shapes):
        self.config, self.moe = config, moe
        experts, hidden, inner = moe.num_experts, config.hidden_size, moe.intermediate_size
        halves = 2 if config.gated_mlp else 1
        self.router_DE = shapes.param((hidden, experts))
        self.up_EDcF = shapes.param((experts, hidden, halves, inner), (TENSOR,))
        self.down_EFD = shapes.param((experts, inner, hidden), (TENSOR,))
        self.router_bias_E = shapes.param((experts,)) if moe.bias else None
        self.up_bias_EcF = shapes.param((experts, halves, inner), (TENSOR,)) if moe.bias else None
        self.down_bias_ED = shapes.param((experts, hidden), (TENSOR,)) if moe.bias else None

    def __call__(self, x_TD: jax.Array, norm: Norm | None = None, residual_TD: jax.Array | None = None) -> jax.Array:
        like_TD, x_TD = x_TD, x_TD if norm is None else norm(x_TD)
        exchanges = exchanges_tokens(x_TD, self.moe.num_experts, self.moe.experts_per_token)
        x_TD = x_TD if exchanges else all_tokens(x_TD)
        weights_TX, experts_TX = self._route(x_TD)
        stacks = {"up": self.up_EDcF[...], "down": self.down_EFD[...]}
        if self.up_bias_EcF is not None and self.down_bias_ED is not None:
            stacks |= {"up_bias": self.up_bias_EcF[...], "down_bias": self.down_bias_ED[...]}
        if exchanges:
            return exchange_experts(
                partial(run_grouped, self.config), stacks, residual_TD, x_TD, weights_TX, experts_TX
            )
        compute = run_few if experts_TX.size <= FEW_CHOICES else run_grouped
        local = partial(compute, self.config)
        return expert_parallel(local, stacks, residual_TD, like_TD, x_TD, weights_TX, experts_TX)

    def _route(self, x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights (float32) and indices of the experts of each token."""
        logits_TE = einsum("TD,DE->TE", x_TD, self.router_DE[...]).astype(jnp.float32)
        if self.router_bias_E is not None:
            logits_TE = logits_TE + self.router_bias_E[...].astype(jnp.float32)[None, :]
        weights_TX, experts_TX = jax.lax.top_k(jax.nn.softmax(logits_TE), self.moe.experts_per_token)
        if self.moe.renormalize:
            weights_TX = weights_TX / weights_TX.sum(axis=-1, keepdims=True)
        return weights_TX, experts_TX


def run_few(
    config: ModelConfig,
    first: jax.Array | int,
    stacks: Stacks,
    x_TD: jax.Array,
    weights_TX: jax.Array,
    experts_TX: jax.Array,
) -> jax.Array:
    """One product per choice of a token, reading the chosen expert alone; float32 sum over a token's choices.

    `first`, the index of the first expert held, is traced on several devices: another device's expert costs nothing.
    """
    held = stacks["up"].shape[0]
    rows = []
    for token in range(x_TD.shape[0]):
        total_D = jnp.zeros(x_TD.shape[1], jnp.float32)
        for choice in range(experts_TX.shape[1]):
            local = experts_TX[token, choice] - first
            run = partial(_expert, config, reduce_einsum, x_TD[token : token + 1], stacks)
            if isinstance(first, int):
                y_TD = run(local)
            else:
                here = (local >= 0) & (local < held)
                y_TD = jax.lax.cond(here, run, lambda _: jnp.zeros_like(x_TD[:1]), local)
            total_D = total_D + y_TD[0].astype(jnp.float32) * weights_TX[token, choice]
        rows.append(total_D)
    return jnp.stack(rows).astype(x_TD.dtype)


def _expert(
    config: ModelConfig, product: Callable[..., jax.Array], x_TD: jax.Array, stacks: Stacks, index: jax.Array
) -> jax.Array:
    """[T, D] to [T, D]: one expert for all of the tokens; `product` multiplies by a weight, as `einsum` does."""
    expert = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), stacks)
    up_TcF = product("TD,DcF->TcF", x_TD, expert["up"])
    if "up_bias" in expert:
        up_TcF = up_TcF + expert["up_bias"][None]
    y_TD = product("TF,FD->TD", activate(config, up_TcF), expert["down"])
    return y_TD + expert["down_bias"][None] if "down_bias" in expert else y_TD


def run_grouped(
    config: ModelConfig,
    first: jax.Array | int,
    stacks: Stacks,
    x_TD: jax.Array,
    weights_TX: jax.Array,
    experts_TX: jax.Array,
) -> jax.Array:
    """A row per choice of a token, sorted by expert, then tile by tile; float32 sum over a token's choices."""
    (tokens, choices), held = experts_TX.shape, stacks["up"].shape[0]
    local = experts_TX.reshape(-1) - first
    here = (local >= 0) & (local < held)
    group = jnp.where(here, local, held)  # rows of other devices' experts go last and stay out of every group
    order = jnp.argsort(group, stable=True)
    sizes_E = jnp.bincount(group, length=held + 1)[:held].astype(jnp.int32)

    y = _run_tiles(config, stacks, x_TD, order // choices, sizes_E)
    y_TXD = y[jnp.argsort(order)].reshape(tokens, choices, -1).astype(jnp.float32)
    weighted = jnp.where(here.reshape(tokens, choices, 1), y_TXD * weights_TX[:, :, None], 0.0)
    return weighted.sum(axis=1).astype(x_TD.dtype)


def _run_tiles(
    config: ModelConfig, stacks: Stacks, x_TD: jax.Array, tokens: jax.Array, sizes_E: jax.Array
) -> jax.Array:
    """Each row's token through the expert of its group; a row's index is its place in the order of the groups.

    A tile is rows of one group, so each product has the weights of one expert. There are as many steps as tiles, and
    none for an expert without rows. A group's last tile runs on into the rows after it; those belong to tiles still
    to come, which overwrite them, or to no group.
    """
    rows, hidden = tokens.shape[0], x_TD.shape[1]
    tile = min(LARGEST_TILE, 1 << max(SMALLEST_TILE, rows // sizes_E.shape[0]).bit_length() - 1)
    tiles_E = (sizes_E + tile - 1) // tile
    ends_E = jnp.cumsum(tiles_E)
    # Tile i of all is tile i - (ends - tiles) of its group, which starts at row sum(sizes) of the groups before.
    offset_E = jnp.cumsum(sizes_E) - sizes_E - tile * (ends_E - tiles_E)
    tokens = jnp.pad(tokens, (0, tile))  # the last tile too is whole

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        index = jnp.searchsorted(ends_E, i, side="right", method="compare_all")
        start = offset_E[index] + tile * i
        x = x_TD[jax.lax.dynamic_slice_in_dim(tokens, start, tile)]
        return jax.lax.dynamic_update_slice_in_dim(y, _expert(config, einsum, x, stacks, index), start, axis=0)

    return jax.lax.fori_loop(0, ends_E[-1], step, jnp.zeros((rows + tile, hidden), x_TD.dtype))

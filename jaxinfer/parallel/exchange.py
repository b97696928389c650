"""Tokens go to the devices of their experts, and come back: expert parallelism by all-to-all (Lepikhin et al. 2020,
GShard, section 3.1), for many tokens, of which each device holds its part.

A token goes once to each device that holds any of its experts. How many go to one device depends on the routing, and
buffers are of a fixed size; so a round takes a fixed number of tokens from each device to each other, and there are as
many rounds as the fullest needs: nearly always one, and no token is ever dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxinfer.parallel.collectives import SPREAD, is_spread
from jaxinfer.parallel.mesh import TENSOR

HEADROOM = 1.25  # of a round, over the tokens that even routing sends to a device
# The part of all tokens that a device is sent, from which on it may as well have them all: their way there and back,
# with the weights of their choices, is then no shorter than an all-gather and a reduce-scatter.
WORTHWHILE = 0.6


def exchanges_tokens(x_TD: jax.Array, experts: int, choices: int) -> bool:
    """Whether tokens go to their experts: where each device holds its part of x, and they have few enough to go to."""
    return is_spread(x_TD) and visited(experts, choices, jax.sharding.get_abstract_mesh().shape[TENSOR]) < WORTHWHILE


def visited(experts: int, choices: int, devices: int) -> float:
    """The part of the tokens that have an expert on a given device, where every choice of experts is as likely."""
    elsewhere = experts - experts // devices
    return 1 - math.comb(elsewhere, choices) / math.comb(experts, choices)


def exchange_experts(
    local: Callable[..., jax.Array], experts: Any, residual_TD: jax.Array | None, x_TD: jax.Array,
    weights_TX: jax.Array, experts_TX: jax.Array,
) -> jax.Array:  # fmt: skip
    """residual + the sum over devices of `local(first_expert, experts, x_TD, weights_TX, experts_TX)` of their tokens.

    Args:
        local: gives nothing for choices that are not of the experts that a device holds.
        experts: a pytree of arrays sharded over their first axis, E; as for `expert_parallel`.
        residual_TD, x_TD, weights_TX, experts_TX: each device's part of the tokens, and so is the result.
    """
    count = jax.tree.leaves(experts)[0].shape[0]

    def on_device(experts, residual_TD, x_TD, weights_TX, experts_TX):
        rounds = _Rounds(experts_TX, count)
        first = lax.axis_index(TENSOR) * rounds.held

        def one(i: jax.Array, sum_TD: jax.Array) -> jax.Array:
            index_NC = rounds.sent(i)
            sent = _rows(x_TD, index_NC, 0), _rows(weights_TX, index_NC, 0), _rows(experts_TX, index_NC, count)
            given = (_swap(rows).reshape(-1, rows.shape[-1]) for rows in sent)
            y = _swap(local(first, experts, *given).reshape(*index_NC.shape, -1))
            return sum_TD.at[index_NC].add(y.astype(jnp.float32), mode="drop")

        sum_TD = lax.fori_loop(0, rounds.number, one, jnp.zeros(x_TD.shape, jnp.float32)).astype(x_TD.dtype)
        return sum_TD if residual_TD is None else residual_TD + sum_TD

    specs = P(TENSOR), SPREAD, SPREAD, SPREAD, SPREAD
    mapped = jax.shard_map(on_device, in_specs=specs, out_specs=SPREAD, check_vma=False)
    return mapped(experts, residual_TD, x_TD, weights_TX, experts_TX)


class _Rounds:
    """Which of a device's tokens go to which device in which round.

    Attributes:
        held: experts of each device.
        size: tokens that a device sends to each in a round.
        number: of rounds, on all devices the same.
    """

    def __init__(self, experts_TX: jax.Array, count: int):
        (tokens, choices), devices = experts_TX.shape, lax.axis_size(TENSOR)
        self.held, self.tokens = count // devices, tokens
        self.size = min(tokens, math.ceil(HEADROOM * tokens * visited(count, choices, devices)))
        goes_TN = (experts_TX[:, :, None] // self.held == jnp.arange(devices)[None, None, :]).any(axis=1)
        # The place of each token in the queue to each device; the others of all tokens are in none.
        self._place_TN = jnp.where(goes_TN, jnp.cumsum(goes_TN, axis=0) - 1, -1)
        fullest = lax.pmax(goes_TN.sum(axis=0).max(), TENSOR)
        self.number = (fullest + self.size - 1) // self.size

    def sent(self, i: jax.Array) -> jax.Array:
        """The tokens of round i by device, [N, C]; one past the last where there are no more."""
        tokens, devices = self._place_TN.shape
        place_TN = self._place_TN - i * self.size
        place_TN = jnp.where(place_TN < 0, self.size, place_TN)  # else it would count from the end
        token_TN = jnp.broadcast_to(jnp.arange(tokens)[:, None], place_TN.shape)
        device_TN = jnp.broadcast_to(jnp.arange(devices)[None, :], place_TN.shape)
        empty_NC = jnp.full((devices, self.size), tokens, token_TN.dtype)
        return empty_NC.at[device_TN, place_TN].set(token_TN, mode="drop")


def _rows(array: jax.Array, index_NC: jax.Array, empty: int) -> jax.Array:
    """Rows of an array, and `empty` for the index past its last."""
    return array.at[index_NC].get(mode="fill", fill_value=empty)


def _swap(array_NC: jax.Array) -> jax.Array:
    """What each device has for each other, [N, C, ...], becomes what each has from each other."""
    return lax.all_to_all(array_NC, TENSOR, split_axis=0, concat_axis=0)

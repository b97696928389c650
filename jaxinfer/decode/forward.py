"""A model over the slots' pages: what a step runs of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from jaxinfer.cache import Pages
from jaxinfer.decode.batch import Batch
from jaxinfer.decode.microbatches import divide
from jaxinfer.model import Model, Network, Params
from jaxinfer.parallel import take_rows

Cache = tuple[Pages, ...]


@dataclass(frozen=True)
class Forward:
    """Calls one model with batches over one kind of pages.

    Attributes:
        page_size, cache_dtype, attention: see `jaxinfer.decode.layout.Layout`.
        layers: how many of the first layers run; all by default.
        views: which of a batch's views each cache group of the model has; its own by default.
        taps: layers whose outputs a method of speculation is shown in the place of the last hidden states.
    """

    model: Model
    page_size: int
    cache_dtype: str
    attention: str
    layers: int | None = None
    views: tuple[int, ...] | None = None
    taps: tuple[int, ...] = ()

    def __call__(
        self, params: Params, cache: Cache, batch: Batch, rows_W: jax.Array
    ) -> tuple[Cache, jax.Array, jax.Array, jax.Array]:
        """The cache with the batch's keys and values, logits of some of its rows [W, V], hidden states of all, and
        what of all a method is shown [T, E]: these, or the outputs of the tapped layers side by side."""
        if self.views is not None:
            batch = replace(batch, views=tuple(batch.views[view] for view in self.views))
        own, scheduled = self.own(params), partial(self.scheduled, network=self.model)
        if self.model.stages > 1:
            forward, batch = self.model.forward_in_stages, divide(batch, scheduled, self.model)
        else:
            forward, batch = self.model.forward, scheduled(batch)
        hidden_TD, tapped, cache = forward(own, batch, cache, self.layers, self.taps)
        shown_TE = jnp.concatenate(tapped, axis=1) if tapped else hidden_TD
        return cache, self.model.logits(own, take_rows(hidden_TD, rows_W)), hidden_TD, shown_TE

    def own(self, params: Params) -> Params:
        """The model's parameters, which come before those of others."""
        return params[: len(self.model.parameters)]

    def others(self, params: Params) -> Params:
        """Those of a method of speculation, which come behind the model's."""
        return params[len(self.model.parameters) :]

    def scheduled(self, batch: Batch, network: Network) -> Batch:
        """The batch, whose views are those of the network's cache groups, with what its layers have in common."""
        config, each = network.config, network.kv_slots_per_device
        queries = config.num_heads // (network.kv_slots // each)
        # The queries of a token and a page of keys, as one device holds them.
        q_NH = jax.ShapeDtypeStruct((queries, config.head_size), jnp.dtype(config.dtype))
        page_SKH = jax.ShapeDtypeStruct((self.page_size, each, config.head_size), jnp.dtype(self.cache_dtype))
        with jax.named_scope("attention"):
            return batch.scheduled(q_NH, page_SKH, config.windows, self.attention)

"""A model over the slots' pages: what a step runs of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from jaxinfer.cache import Pages
from jaxinfer.decode.batch import Batch
from jaxinfer.decode.microbatches import divide
from jaxinfer.model import Model, Network, Params, Unfinished
from jaxinfer.parallel import take_rows

Cache = tuple[Pages, ...]


@dataclass(frozen=True)
class Ran:
    """A pass of a model over a batch.

    Attributes:
        cache: with the batch's keys and values.
        logits_WV, hidden_WD: of the rows that were asked for.
        rest: of all rows what `Forward.hidden` makes hidden states of.
        shown_TE: what of all rows a method of speculation is shown: their hidden states, or the outputs of the tapped
            layers side by side. None where it would be the former, and only the rows that were asked for have any.
    """

    cache: Cache
    logits_WV: jax.Array
    hidden_WD: jax.Array
    rest: jax.Array | Unfinished
    shown_TE: jax.Array | None


@dataclass(frozen=True)
class Forward:
    """Calls one model with batches over one kind of pages.

    Attributes:
        page_size, cache_dtype, attention: see `jaxinfer.decode.layout.Layout`.
        layers: how many of the first layers run; all by default.
        views: which of a batch's views each cache group of the model has; its own by default.
        taps: layers whose outputs a method of speculation is shown in the place of the last hidden states.
        whole: whether the last hidden states of a step with prompts are wanted of all its rows.
    """

    model: Model
    page_size: int
    cache_dtype: str
    attention: str
    layers: int | None = None
    views: tuple[int, ...] | None = None
    taps: tuple[int, ...] = ()
    whole: bool = False

    def __call__(self, params: Params, cache: Cache, batch: Batch, rows_W: jax.Array) -> Ran:
        """Runs the model over a batch, some rows of which are asked for."""
        if self.views is not None:
            batch = replace(batch, views=tuple(batch.views[view] for view in self.views))
        own, scheduled = self.own(params), partial(self.scheduled, network=self.model)
        if self._picks(batch, rows_W):
            given = own, scheduled(batch), cache, rows_W, self.layers, self.taps
            hidden_WD, rest, tapped, cache = self.model.forward_rows(*given)
            shown_TE = None
        else:
            if self.model.stages > 1:
                forward, batch = self.model.forward_in_stages, divide(batch, scheduled, self.model)
            else:
                forward, batch = self.model.forward, scheduled(batch)
            rest, tapped, cache = forward(own, batch, cache, self.layers, self.taps)
            hidden_WD, shown_TE = take_rows(rest, rows_W), rest
        shown_TE = jnp.concatenate(tapped, axis=1) if tapped else shown_TE
        return Ran(cache, self.model.logits(own, hidden_WD), hidden_WD, rest, shown_TE)

    def _picks(self, batch: Batch, rows_W: jax.Array) -> bool:
        """Whether the last layer is finished for the rows alone that are asked for. Of a step without prompts these
        are all or nearly all; and a pipe has them in several micro-batches."""
        few, layers = 0 < len(rows_W) < len(batch.tokens_T), self.layers or self.model.config.num_layers
        wanted = self.whole or layers - 1 in self.taps  # of all rows
        return few and batch.has_prompts and self.model.stages == 1 and not wanted

    def hidden(self, params: Params, rest: jax.Array | Unfinished) -> jax.Array:
        """Hidden states of all rows, [T, D], of what `__call__` leaves of them."""
        return self.model.finish(self.own(params), rest, self.layers) if isinstance(rest, Unfinished) else rest

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

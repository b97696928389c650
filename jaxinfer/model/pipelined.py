"""A transformer whose layers are divided among the stages of a pipe."""

from __future__ import annotations

from typing import Any

import jax

from jaxinfer.model.attention import Attends
from jaxinfer.model.transformer import Transformer
from jaxinfer.parallel import pipeline
from jaxinfer.parallel.pipeline import BatchOf, Exit, Stage


def forward(
    module: Transformer, stages: int, batches: Attends, cache: tuple[Any, ...], layers: int | None,
    taps: tuple[int, ...],
):  # fmt: skip
    """See `Model.forward_in_stages`.

    Of fewer layers than there are, the stages run whole up to that of the last one, unless that is the first: keys and
    values that it writes beyond are written again when all layers run.
    """
    each = len(module.layers)
    wanted = [tap + 1 for tap in taps] + [each * stages if layers is None else layers]
    places = [divmod(count - 1, each) for count in wanted]
    inner = tuple(dict.fromkeys(layer for _, layer in places))
    exits = tuple(Exit(stage, inner.index(layer)) for stage, layer in places)
    last = max(exit.stage for exit in exits)
    run, weights = _stage(module, each if last else max(inner) + 1, inner)
    tokens_mt = batches.tokens_T[:-1]
    x_TD = module.embed(tokens_mt.reshape(-1))
    x_mtD = x_TD.reshape(*tokens_mt.shape, x_TD.shape[-1])
    left, own = pipeline.run(run, weights, cache[:each], x_mtD, batches, exits, last + 1)
    *tapped, hidden_TD = (each_mtD.reshape(-1, each_mtD.shape[-1]) for each_mtD in left)
    return hidden_TD, tuple(tapped), (*own, *cache[each:])


def advance(
    module: Transformer, x_ptD: jax.Array, tokens_t: jax.Array, batch_of: BatchOf, told: Any, cache: tuple[Any, ...]
):  # fmt: skip
    """See `Model.advance`."""
    each = len(module.layers)
    run, weights = _stage(module, each, (each - 1,))
    first_tD = module.embed(tokens_t)
    x_ptD, left_tD, own = pipeline.advance(run, weights, cache[:each], x_ptD, first_tD, batch_of, told)
    return x_ptD, left_tD, (*own, *cache[each:])


def _stage(module: Transformer, layers: int, taps: tuple[int, ...]) -> tuple[Stage, Any]:
    """What a stage runs: the first of its layers, and what leaves those of `taps`; their weights."""
    graphs, weights = module.split(layers)

    def run(weights: Any, cache: tuple[Any, ...], x_tD: jax.Array, batch: Attends):
        return module.run(graphs, weights, x_tD, batch, cache, taps)

    return run, weights

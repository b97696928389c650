"""A transformer whose layers are divided among the stages of a pipe."""

from __future__ import annotations

from typing import Any

import jax

from jaxinfer.model.attention import Attends
from jaxinfer.model.transformer import Transformer
from jaxinfer.parallel import pipeline
from jaxinfer.parallel.pipeline import Exit, Stage


def forward(
    module: Transformer, stages: int, batches: Attends, cache: tuple[Any, ...], layers: int | None,
    taps: tuple[int, ...],
):  # fmt: skip
    """See `Model.pipelined`.

    Of fewer layers than there are, the stages run whole up to that of the last one, unless that is the first: keys and
    values that it writes beyond are written again when all layers run.
    """
    each = len(module.layers)
    wanted = [tap + 1 for tap in taps] + [each * stages if layers is None else layers]
    places = [divmod(count - 1, each) for count in wanted]
    inner = tuple(dict.fromkeys(layer for _, layer in places))
    exits = tuple(Exit(stage, inner.index(layer)) for stage, layer in places)
    last = max(exits)[0]
    run, weights = stage_of(module, each if last else max(inner) + 1, inner)
    x_mtD = _micro(module.embed(batches.tokens_T[:-1].reshape(-1)), len(batches.tokens_T) - 1)
    left, own = pipeline.run(run, weights, cache[:each], x_mtD, batches, exits, last + 1)
    *tapped, hidden_TD = (each_mtD.reshape(-1, each_mtD.shape[-1]) for each_mtD in left)
    return hidden_TD, tuple(tapped), (*own, *cache[each:])


def stage_of(module: Transformer, layers: int, taps: tuple[int, ...]) -> tuple[Stage, Any]:
    """What a stage runs: the first of its layers, and what leaves those of `taps`; their weights."""
    graphs, weights = module.split(layers)

    def run(weights: Any, cache: tuple[Any, ...], x_tD: jax.Array, batch: Attends):
        return module.run(graphs, weights, x_tD, batch, cache, taps)

    return run, weights


def _micro(x_TD: jax.Array, count: int) -> jax.Array:
    return x_TD.reshape(count, -1, x_TD.shape[-1])

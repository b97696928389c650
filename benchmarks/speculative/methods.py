"""Methods by name, and weights for them where the model has random ones."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import cast

import numpy as np

from benchmarks.bench import MODELS
from jaxinfer.decode.speculative import METHODS, Loader, Speculation, by_name
from jaxinfer.model import EagleHead, Model, Params, read_config, read_eagle_config
from jaxinfer.training.eagle import head_config

CHAINS = ("draft", "early-exit", "lookup")  # the others propose trees
HEADS = 4  # of Medusa, as many as the demo model has


def named(name: str, drafts: int | None = None, checkpoint: str | None = None) -> Speculation:
    """As `by_name`."""
    return cast(Speculation, by_name(name, drafts, checkpoint))


def name_of(method: Speculation) -> str:
    return next(name for name, kind in METHODS.items() if isinstance(method, kind))


def random_weights(target: Model) -> Loader:
    """Gives methods random weights for a model, the same whenever they ask: a draft model those of a folder of
    configs/models; heads those of the sizes that are trained for such a model."""

    @cache
    def model(name: str | Path | None) -> tuple[Model, Params]:
        made = Model(read_config(MODELS / str(name)), target.mesh, target.context)
        return made, made.random_params(1)

    @cache
    def tensors(name: str | Path | None, file: str) -> dict[str, np.ndarray]:
        rng, D = np.random.default_rng(1), target.config.hidden_size
        blocks = {}
        for head in range(HEADS):
            blocks[f"{head}.0.linear.weight"] = D**-0.5 * rng.standard_normal((D, D), np.float32)
            blocks[f"{head}.0.linear.bias"] = np.zeros(D, np.float32)
        return blocks

    @cache
    def head(name: str | Path | None) -> tuple[EagleHead, Params]:
        made = EagleHead(read_eagle_config(head_config(target.config)), target, embeds=False, bias=True)
        return made, made.random_params(1)

    return Loader(target, model, tensors, head)

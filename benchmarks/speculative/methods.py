"""Methods by name, weights for them where the model has random ones, and other proposals in the place of theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.bench import MODELS
from jaxinfer.decode.forward import Cache, Forward
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.slots import SlotState
from jaxinfer.decode.speculative import METHODS, Loader, Proposal, Speculation, by_name
from jaxinfer.model import EagleHead, Model, Params, read_config, read_eagle_config
from jaxinfer.training.eagle import head_config

CHAINS = ("draft", "early-exit", "lookup")  # the others propose trees
HEADS = 4  # of Medusa, as many as the demo model has


def named(name: str, drafts: int | None = None, checkpoint: str | None = None) -> Speculation:
    """As `by_name`."""
    return cast(Speculation, by_name(name, num_speculative_tokens=drafts, draft_model=checkpoint))


def name_of(method: Speculation) -> str:
    return next(name for name, kind in METHODS.items() if isinstance(method, kind))


def random_weights(target: Model) -> Loader:
    """Gives methods random weights for a model, the same whenever they ask: a draft model those of a folder of
    configs/models; heads those of the sizes that are trained for such a model."""

    def model(name: str | Path | None) -> Model:
        return Model(read_config(MODELS / str(name)), target.mesh, target.context)

    @cache
    def params(name: str | Path | None, made: Model) -> Params:
        return made.random_params(1)

    @cache
    def tensors(name: str | Path | None, file: str) -> dict[str, np.ndarray]:
        rng, D = np.random.default_rng(1), target.config.hidden_size
        blocks = {}
        for head in range(HEADS):
            blocks[f"{head}.0.linear.weight"] = D**-0.5 * rng.standard_normal((D, D), np.float32)
            blocks[f"{head}.0.linear.bias"] = np.zeros(D, np.float32)
        return blocks

    @cache
    def head(name: str | Path | None) -> EagleHead:
        return EagleHead(read_eagle_config(head_config(target.config)), target, embeds=False, bias=True)

    @cache
    def head_params(name: str | Path | None, made: EagleHead) -> Params:
        return made.random_params(1)

    def check_room(shapes: Iterable[Any]) -> None:
        """The target's weights are there already: its own error says that these do not fit."""

    return Loader(target, model, params, tensors, head, head_params, check_room)


def shaped(name: str, sizes: Sequence[int | None], draft_model: str, model: Model) -> list[Speculation]:
    """The method with proposals of these sizes, and random weights for a model.

    Args:
        draft_model: the folder of configs/models of a draft.

    Raises:
        ValueError: it cannot propose so many tokens, or none for this model.
    """
    loader, checkpoint = random_weights(model), draft_model if name == "draft" else None
    return [named(name, size, checkpoint).loaded(loader) for size in sizes]


def changed(method: Speculation, change: Callable[[Proposal, SlotState], Proposal]) -> Speculation:
    """The method in all but what it proposes."""

    def propose(
        target: Forward, params: Params, needs: Needs, state: SlotState, cache: Cache
    ) -> tuple[Proposal, Cache]:
        proposal, cache = method.propose(target, params, needs, state, cache)
        return change(proposal, state), cache

    other = copy(method)
    object.__setattr__(other, "propose", propose)  # methods are frozen
    return other

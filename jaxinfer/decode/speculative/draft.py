"""A smaller model drafts (Leviathan et al. 2022, "Fast Inference from Transformers via Speculative Decoding", arXiv
2211.17192; Chen et al. 2023, "Accelerating Large Language Model Decoding with Speculative Sampling", arXiv
2302.01318).

Its layers have pages of the same numbers as the model's, so that one allocator, its shared prefixes and its page
tables serve both; it computes the prompts in the steps in which the model does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp

from jaxinfer.decode.forward import Cache, Forward
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.slots import SlotState
from jaxinfer.decode.speculative.autoregressive import draft
from jaxinfer.decode.speculative.method import (
    Loader,
    Observed,
    Pass,
    Pool,
    Proposal,
    Speculation,
    check_drafts,
    group_of,
)
from jaxinfer.model import Model, Params


@dataclass(frozen=True)
class DraftModel(Speculation):
    """Proposes what a smaller model of the same vocabulary draws.

    Attributes:
        checkpoint: a folder or a Hugging Face id; None is the draft that ships for the demo model.
        num_speculative_tokens: k, 1..MOST_DRAFTS.
        coupled: a sampled token is drawn with the noise of plain decoding, and accepted where the model draws the same
            one: outputs are those of plain decoding, token for token. By default it is accepted with the probability
            that makes most of it, and what replaces a refused one is drawn from what is left of the model's
            distribution: outputs have the model's distribution, and more tokens are accepted. Greedy decoding is the
            same in both.
        model, params: the model and its parameters, once they are loaded.

    Raises:
        ValueError: one of them is out of range.
    """

    checkpoint: str | Path | None = None
    num_speculative_tokens: int = 4
    coupled: bool = False
    model: Model | None = field(default=None, repr=False, compare=False)
    params: Params | None = field(default=None, repr=False, compare=False)
    adapts = True
    reads_text = True
    draws = True

    def __post_init__(self):
        check_drafts(self.num_speculative_tokens)

    def read(self, loader: Loader) -> Self:
        return replace(self, model=loader.model(self.checkpoint))

    def shapes(self, model: Model) -> Iterable[Any]:
        assert self.model is not None
        return self.model.parameters.values()

    def placed(self, loader: Loader) -> Self:
        assert self.model is not None
        return replace(self, params=loader.params(self.checkpoint, self.model))

    def check(self, model: Model) -> None:
        if self.model is None:
            raise ValueError(f"the draft model {self.checkpoint} is not loaded; `LLM` loads it")
        ours, theirs = self.model.config, model.config
        if ours.vocab_size != theirs.vocab_size:
            raise ValueError(
                f"the draft model {self.checkpoint} has a vocabulary of {ours.vocab_size} tokens; it must have the "
                f"model's, {theirs.vocab_size}"
            )
        if any(group_of(window, theirs.windows) is None for window in ours.windows):
            raise ValueError(
                f"the draft model {self.checkpoint} has the attention windows {ours.windows}; the model keeps no more "
                f"keys than {theirs.windows}"
            )
        if any(theirs.windows[group] == 1 for group in self._groups(model)):
            raise ValueError(
                f"the draft model {self.checkpoint} writes the keys of two tokens in a step; the model keeps only one"
            )

    @property
    def weights(self) -> Params:
        assert self.params is not None
        return self.params

    def passes(self, model: Model) -> list[Pass]:
        assert self.model is not None
        config = self.model.config
        return [Pass(config, queries=2)] + [Pass(config)] * (self.num_speculative_tokens - 1)

    def pools(self, model: Model) -> list[Pool]:
        assert self.model is not None
        own, config, groups = self.model, self.model.config, self._groups(model)
        return [
            Pool(groups[config.group(layer)], own.kv_slots, own.kv_slots_per_device, config.head_size)
            for layer in range(config.num_layers)
        ]

    def propose(
        self, target: Forward, params: Params, needs: Needs, state: SlotState, cache: Cache
    ) -> tuple[Proposal, Cache]:
        forward, weights, theirs, ours = self._own(target, params, cache)
        proposal, ours = draft(
            forward, weights, ours, state, needs, self.num_speculative_tokens, catch_up=True, coupled=self.coupled
        )
        return proposal, (*theirs, *ours)

    def observe(self, target: Forward, params: Params, state: SlotState, step: Observed, cache: Cache) -> Cache:
        forward, weights, theirs, ours = self._own(target, params, cache)
        no_rows_W = jnp.zeros(0, jnp.int32)
        return (*theirs, *forward(weights, ours, step.batch, no_rows_W).cache)

    def _own(self, target: Forward, params: Params, cache: Cache) -> tuple[Forward, Params, Cache, Cache]:
        """The model's forward pass and parameters; the cache's layers of the target, and its own."""
        assert self.model is not None
        forward = replace(target, model=self.model, views=self._groups(target.model))
        layers = target.model.per_stage
        return forward, target.others(params), cache[:layers], cache[layers:]

    def _groups(self, model: Model) -> tuple[int, ...]:
        """The cache group of the target for each of its own."""
        assert self.model is not None
        found = [group_of(window, model.config.windows) for window in self.model.config.windows]
        return tuple(group for group in found if group is not None)

"""The first layers of the model draft for the whole of it (Zhang et al. 2023, "Draft & Verify", arXiv 2309.08168;
Elhoushi et al. 2024, "LayerSkip", arXiv 2404.16710).

No other weights, and one cache: the keys and values that the first layers write for their proposals are those that the
whole model writes there again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxinfer.decode.arguments import check_size
from jaxinfer.decode.forward import Cache, Forward
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.slots import SlotState
from jaxinfer.decode.speculative.autoregressive import draft
from jaxinfer.decode.speculative.method import Pass, Proposal, Speculation, check_drafts
from jaxinfer.model import Model, Params


@dataclass(frozen=True)
class EarlyExit(Speculation):
    """Proposes what the model's head draws of the hidden states that leave its first layers.

    Attributes:
        num_speculative_tokens: k, 1..MOST_DRAFTS.
        exit_layers: how many layers draft; None is a quarter of them, at least one.
        coupled: see `DraftModel`.

    Raises:
        ValueError: one of them is out of range.
    """

    num_speculative_tokens: int = 3
    exit_layers: int | None = None
    coupled: bool = False
    adapts = True
    draws = True

    def __post_init__(self):
        check_drafts(self.num_speculative_tokens)
        if self.exit_layers is not None:
            check_size("exit_layers", self.exit_layers, 1)

    def check(self, model: Model) -> None:
        if (layers := self._layers(model)) >= model.config.num_layers:
            raise ValueError(f"exit_layers = {layers} must be fewer than the model's {model.config.num_layers} layers")

    def passes(self, model: Model) -> list[Pass]:
        first = replace(model.config, layers=model.config.layers[: self._layers(model)])
        return [Pass(first)] * self.num_speculative_tokens

    def propose(
        self, target: Forward, params: Params, needs: Needs, state: SlotState, cache: Cache
    ) -> tuple[Proposal, Cache]:
        first = replace(target, layers=self._layers(target.model))
        return draft(
            first, params, cache, state, needs, self.num_speculative_tokens, catch_up=False, coupled=self.coupled
        )

    def _layers(self, model: Model) -> int:
        return self.exit_layers or max(1, model.config.num_layers // 4)

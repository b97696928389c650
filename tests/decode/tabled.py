"""Methods of speculation over a model that is a table of logits: they propose themselves, in the step of the engine's
loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np

from jaxinfer.decode.forward import Forward, Ran
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.slots import SlotState
from jaxinfer.decode.speculative import (
    DraftModel,
    Eagle,
    EarlyExit,
    Lookahead,
    Medusa,
    PromptLookup,
    Speculation,
    SpeculativeStep,
)
from jaxinfer.decode.speculative.eagle import Recent
from jaxinfer.decode.speculative.lookahead import Trajectories
from jaxinfer.decode.speculative.medusa import Head
from tests.decode.adversary import Adversary
from tests.decode.enumerated import VOCAB
from tests.decode.placed import placed


@dataclass(frozen=True)
class Table(Forward):
    """A model whose logits depend on the token before alone, which is its hidden state too. Its parameters are its
    logits, and then those of whatever drafts for it; its first layers draft with these."""

    def __call__(self, params, cache, batch, rows_W):
        table_VV = params[0 if self.layers is None else 1]
        hidden_TV = jax.nn.one_hot(batch.tokens_T, VOCAB)
        return Ran(cache, table_VV[batch.tokens_T[rows_W]], hidden_TV[rows_W], hidden_TV, hidden_TV)

    def scheduled(self, batch, network):
        return batch


class OneHot:
    """A head of Eagle that expects of each token the hidden state that `Table` has there, and goes by logits too."""

    config = SimpleNamespace(windows=(None,))

    def taps(self, model):
        return ()

    def features(self, params, model, own, shown_TV):
        return shown_TV

    def forward(self, params, model, own, batch, features_TV, pages):
        return jax.nn.one_hot(batch.tokens_T, VOCAB), pages

    def logits(self, params, model, own, features_TV):
        return features_TV @ params[0]

    def tokens(self, params, ids_Tr):
        return ids_Tr


# What methods ask of models, of which no layer has a cache.
MODEL: Any = SimpleNamespace(
    config=SimpleNamespace(num_layers=2, windows=(None,), hidden_size=VOCAB, vocab_size=VOCAB, dtype="float32"),
    parameters={"table": None}, per_stage=0, head=lambda params, hidden_TV: (hidden_TV, params[0], None),
)  # fmt: skip
SMALLER: Any = SimpleNamespace(config=SimpleNamespace(windows=(None,), num_layers=0))
EAGLE: Any = OneHot()
HEADS: Any = (Head((), np.zeros((VOCAB, VOCAB), np.float32)),) * 2  # pyright: ignore[reportArgumentType], on the host
TABLE = Table(MODEL, page_size=64, cache_dtype="", attention="")
NO_PAGES: Any = (None,)  # of a head of Eagle
CHAIN, TREE, OTHER, ROOTS = (-1, 0, 1, 2), (-1, -1, 0, 1, 0, 2), (-1, 0, 1, 2, 0, -1), (-1,) * 6

METHODS: dict[str, Speculation] = {
    "lookup": PromptLookup(3, 2),
    "lookahead": Lookahead(2, 3, 2, 6),
    "draft": DraftModel("", 2, model=SMALLER),
    "early-exit": EarlyExit(2, 1),
    "medusa": Medusa("", 6, heads=HEADS),
    "eagle": Eagle("", 6, 2, 3, head=EAGLE),
    "any chain": Adversary((CHAIN,)),
    "any tree": Adversary((TREE, OTHER, ROOTS)),
}


def stepping(method: Speculation, needs: Needs) -> Callable:
    """The step of a method, given the state of the slots and all parameters: the state after it, what was drawn, and
    what of that counts."""
    speculative = SpeculativeStep(TABLE, method, ())

    @jax.jit
    def step(state: SlotState, params: list[jax.Array]):
        proposal, _ = speculative.propose(params, needs, state, NO_PAGES)
        _, logits_WV, shown_TV = speculative.run(params, state, (), proposal)
        state, _, sampled, emits_dB = speculative.take(needs, state, (), proposal, logits_WV, shown_TV)
        return state, sampled, emits_dB

    return step


def weights(method: Speculation, table_VV: np.ndarray, knows: bool = False) -> list[np.ndarray]:
    """What a method proposes by: logits of a token by the one before, and whether an `Adversary` knows better."""
    if isinstance(method, Medusa):
        return [np.ascontiguousarray(table_VV.T)] * len(HEADS)
    return [table_VV, np.asarray(knows)] if isinstance(method, Adversary) else [table_VV]


def begun(method: Speculation, state: SlotState, text_BT: np.ndarray, length: int = 0) -> SlotState:
    """The slots before a method's first step.

    Args:
        text_BT: of each slot; its newest token is the one at `length`.
    """
    slots, memory = len(text_BT), cast(Any, method.memory(MODEL, len(text_BT)))
    if isinstance(memory, Recent):
        shown_BdV = np.zeros(memory.shown_BdE.shape, np.float32)
        shown_BdV[..., 0] = 1
        memory = Recent(shown_BdV, np.ones(slots, np.int32))  # pyright: ignore[reportArgumentType], on the host
    elif isinstance(memory, Trajectories):
        memory = trajectories(memory, text_BT)
    elif memory is not None:
        memory = np.tile(np.eye(VOCAB, dtype=np.float32)[0], (slots, 1))
    return placed(replace(state, text_BT=text_BT, length_B=np.full(slots, length, np.int32), memory=memory))


def trajectories(empty: Trajectories, text_BT: np.ndarray) -> Trajectories:
    """With what the text begins with in the window and in n-grams, as though it was to come."""
    _, levels, width = empty.window_BLW.shape
    pool_BPN, known = np.array(empty.pool_BPN), empty.pool_BPN.shape[1] // 2
    window_BLW = np.stack([text_BT[:, level : level + width] for level in range(levels)], axis=1)
    for place in range(known):
        pool_BPN[:, place] = text_BT[:, place : place + pool_BPN.shape[2]]
    made: Any = (window_BLW, pool_BPN, np.full(len(text_BT), known, np.int32))
    return Trajectories(*made)

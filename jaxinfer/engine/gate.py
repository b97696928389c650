"""Whether the next program of decode steps proposes tokens: where the cost model says that this brings more tokens a
second.

A step that verifies takes longer the more sequences share it, since arithmetic bounds it sooner than a plain step; and
what it brings depends on how many proposed tokens are right, which the text decides. So the gate weighs two numbers
before every program: how many plain steps take as long as one that verifies, predicted for the sequences that decode
now, and how many tokens one has brought lately. No time is measured, so that the same requests make the same programs.

Where plain decoding is faster nothing would be learnt of the text, and the gate lets a program propose now and then:
so seldom that it costs little, by prediction. It changes outputs as little as the method does: what is proposed for
certain not at all, but for rounding. A draft model does not see what is decoded plainly, and proposes worse after it.
"""

from __future__ import annotations

import math

import numpy as np

from jaxinfer.decode.speculative import tree_of
from jaxinfer.decode.step import Layout, pools_of
from jaxinfer.engine.buckets import rectangle
from jaxinfer.engine.budget import Times, attends_whole_rows, step_times
from jaxinfer.engine.options import Options
from jaxinfer.engine.sequence import Sequence
from jaxinfer.model import Model
from jaxinfer.roofline import Verification

MEMORY = 256  # proposals over which what earlier ones brought fades
OPTIMISM = 8  # proposals, all of them right, that an engine begins with
PROBES_APART = 64  # programs at the least, of those that could have proposed and did not
PROBES_COST = 0.01  # of the time of the programs between two probes, at the most
# Small kernels beside the model's: those of a search in the text, and for each draw, by estimate and not timed.
SEARCH, DRAW = 9, 4
MOVE = 4  # kernels for each layer of the cache, in which the keys and values of a tree's accepted tokens are moved


class Gate:
    """Says which programs of decode steps propose tokens, and learns from them."""

    def __init__(
        self, layout: Layout, times: Times | None, whole_rows: bool = False,
        proposing: tuple[tuple[Times, int], ...] = (), layers: int = 0, outputs: int = 0,
    ):  # fmt: skip
        """Args:
        times: None proposes always, if there is a method.
        whole_rows: whether decoding reads every slot's whole row of pages, whatever it holds.
        proposing: of each forward pass of a proposal, with its queries of each slot.
        layers: of the cache, in which accepted tokens are moved.
        outputs: of a proposal; see `Speculation`.
        """
        self._drafts, self._depth, self._slots = layout.drafts, layout.depth, layout.slots
        self._times, self._proposing, self._outputs = times, proposing, outputs
        self._kernels = SEARCH + DRAW * (1 + layout.depth) + MOVE * layers
        self._whole_row = layout.pages_per_row * layout.page_size if whole_rows else None
        self._brought_Q = np.full(self._depth + 1, float(OPTIMISM))
        self._plainly = 0  # programs since the last that proposed

    @property
    def accepted(self) -> tuple[float, ...]:
        """How often lately the first proposed token was right, the first two, and so on."""
        return tuple((self._brought_Q[1:] / self._brought_Q[0]).tolist())

    @property
    def tokens(self) -> float:
        """That a step with proposals has brought a sequence lately."""
        return float(self._brought_Q.sum() / self._brought_Q[0])

    def drafts(self, decoding: list[Sequence]) -> int:
        """Proposed tokens that a step of the next program may bring each of these: as many as the method allows, or
        none, where nothing is to be proposed."""
        if not self._drafts or self._times is None:
            return self._depth
        pair = self.predicted(decoding)
        if pair.speedup(self.tokens) > 1 or self._probes(pair.cost):
            self._plainly = 0
            return self._depth
        self._plainly += 1
        return 0

    def learn(self, brought_Q: np.ndarray) -> None:
        """Takes in what steps with proposals brought.

        Args:
            brought_Q: how many there were, and of them those in which the first proposed token was right, the first
                two, and so on.
        """
        self._brought_Q = self._brought_Q * (MEMORY / (MEMORY + brought_Q[0])) + brought_Q

    def predicted(self, decoding: list[Sequence]) -> Verification:
        """Of steps of these, in the rectangle that has room for them."""
        assert self._times is not None
        slots, queries, times = rectangle(len(decoding), self._slots), self._drafts + 1, self._times
        if self._whole_row is None:
            contexts = [len(sequence.tokens) for sequence in decoding]
            longer = [context + self._drafts for context in contexts]
        else:
            contexts = longer = [self._whole_row] * slots
        plain = times.rest(slots, slots) + times.decoding(contexts)
        verifying = times.rest(slots * queries, slots * queries) + times.decoding(longer, queries)
        for own, each in self._proposing:
            verifying += own.rest(slots * each, slots) + own.decoding(longer, each)
        verifying += self._outputs * times.head(slots)
        return Verification(plain, verifying + times.kernels(self._kernels))

    def _probes(self, cost: float) -> bool:
        """Whether it is time to see what proposals bring; never where they would lose even if all were right."""
        apart = max(PROBES_APART, math.ceil((cost - 1) / PROBES_COST))
        return cost < self._depth + 1 and self._plainly >= apart


def predicted_gate(model: Model, layout: Layout, options: Options) -> Gate:
    """By what the cost model says of this model on this machine."""
    if layout.speculation is None or options.always_speculate:
        return Gate(layout, times=None)
    passes = layout.speculation.passes(model)
    own = {one.config: step_times(model, layout, one.config) for one in passes}
    proposing = tuple((own[one.config], one.queries) for one in passes)
    layers = 0 if tree_of(layout.speculation) is None else len(pools_of(model, layout.speculation))
    outputs = layout.speculation.outputs
    return Gate(layout, step_times(model, layout), attends_whole_rows(layout), proposing, layers, outputs)

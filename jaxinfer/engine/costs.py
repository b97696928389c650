"""What a decode step takes, plain or with proposals: predicted by the cost model, and corrected by what steps took.

Predicted are the model's pass over all tokens of the step, in the rectangle that has room for those who decode, the
passes that a method of speculation makes for its proposals, and the small kernels beside these. What is missing or
wrong there is much the same in all steps of a kind, those of one rectangle with as many proposed tokens: the seconds
that some of them took, over those predicted, correct the others.

Where the host checks every step against a grammar its part is in no prediction, and may be the larger one: a mask for
each proposed token, where a plain step needs one. Such steps are kinds of their own, corrected by what they took from
one to the next.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from itertools import product
from statistics import median

from jaxinfer.decode.layout import Layout, pools_of
from jaxinfer.decode.speculative import tree_of
from jaxinfer.engine.buckets import rectangle, rectangles
from jaxinfer.engine.budget import Times, attended, step_times, whole_row
from jaxinfer.engine.metrics import Counters
from jaxinfer.engine.options import Options
from jaxinfer.model import Model
from jaxinfer.roofline import Hardware

# Small kernels beside the model's: those of a search in the text, and for each draw, by estimate and not timed.
SEARCH, DRAW = 9, 4
MOVE = 4  # kernels for each layer of the cache, in which the keys and values of a tree's accepted tokens are moved
TIMED, ENOUGH = 9, 3  # programs of a kind that correct the next: the latest, and how many it takes
Passes = Mapping[int, tuple[tuple[Times, int], ...]]


class Costs:
    """Of the steps of one engine."""

    def __init__(
        self, layout: Layout, times: Times, whole_row: int | None = None, passes: Passes | None = None,
        layers: int = 0,
    ):  # fmt: skip
        """Args:
        whole_row: see `budget.attended`.
        passes: what runs for a proposal, by the layout's `choices`: each pass with its queries of each slot.
        layers: of the cache, in which accepted tokens are moved.
        """
        self._slots, self._times, self._layers = layout.slots, times, layers
        self._whole_row = whole_row
        methods = {drafts: layout.method(drafts) for drafts in layout.choices}
        self._queries = {0: 1} | {drafts: 1 + one.num_speculative_tokens for drafts, one in methods.items()}
        self._outputs = {drafts: one.outputs for drafts, one in methods.items()}
        self._passes = {drafts: Counter((passes or {}).get(drafts, ())) for drafts in methods}
        # What programs took, over what was predicted: by rectangle and whether the host checked, then by proposals.
        self._slower = {
            (size, checked): {drafts: deque[float](maxlen=TIMED) for drafts in self._queries}
            for size, checked in product(rectangles(self._slots), (False, True))
        }

    def seconds(self, contexts: list[int], drafts: int, checked: bool = False) -> float:
        """Of a step of sequences of so many tokens each, in which so many proposed tokens may be right: one of the
        layout's `choices`, or 0.

        The median of a few programs corrects it, so that one that was held up does not count; until there are enough,
        that of all in the rectangle, which favours no kind.

        Args:
            checked: whether the host has a say in what is drawn.
        """
        by_drafts = self._told(contexts, checked)
        timed = [*by_drafts[drafts]]
        if len(timed) < ENOUGH:
            timed = [ratio for every in by_drafts.values() for ratio in every]
        return self.predicted(contexts, drafts) * (median(timed) if timed else 1.0)

    def timed(self, contexts: list[int], drafts: int, checked: bool = False) -> bool:
        """Whether enough of such steps have told what they took."""
        return len(self._told(contexts, checked)[drafts]) >= ENOUGH

    def learn(self, contexts: list[int], drafts: int, seconds: float, checked: bool = False) -> None:
        """Takes in what such a step took, as the mean of a program's."""
        self._told(contexts, checked)[drafts].append(seconds / self.predicted(contexts, drafts))

    def _told(self, contexts: list[int], checked: bool) -> dict[int, deque[float]]:
        return self._slower[rectangle(len(contexts), self._slots), checked]

    def predicted(self, contexts: list[int], drafts: int) -> float:
        """By the cost model alone."""
        slots, queries, times = rectangle(len(contexts), self._slots), self._queries[drafts], self._times
        longer = contexts if queries == 1 else [context + queries - 1 for context in contexts]
        read = attended(longer, slots, self._whole_row)
        seconds = times.decode(slots, times.decoding(read, queries), queries)
        if not drafts:
            return seconds
        for (own, each), count in self._passes[drafts].items():
            seconds += count * own.decode(slots, own.decoding(read, each), each, rows=slots)
        seconds += self._outputs[drafts] * times.head(slots)
        return seconds + times.kernels(SEARCH + DRAW * (1 + drafts) + MOVE * self._layers)

    def speedup(self, context: int, brought: Counters) -> float:
        """How many times as fast as plain decoding the cost model alone says that the steps of one output were, whose
        first token its prompt brought: where all propose k tokens, each right with the probability a,
        (1 - a^(k+1)) / (1 - a) over what such a step takes in plain ones (Leviathan et al. 2022, theorem 3.8).

        Args:
            context: tokens of the sequence, halfway through its output.
        """
        right, plain = sum(brought.accepted), self.predicted([context], 0)
        plainly = max(brought.output_tokens - 1 - brought.drafts - right, 0)
        seconds = plainly * plain + brought.drafts * plain * self.cost(context, brought)
        return (brought.drafts + right + plainly) * plain / seconds

    def cost(self, context: int, brought: Counters) -> float:
        """Plain steps that take as long as one of the steps with proposals, by the cost model alone; 0 without any."""
        sized = [(drafts, count) for drafts, count in enumerate(brought.proposed, 1) if count]
        seconds = sum(count * self.predicted([context], drafts) for drafts, count in sized)
        return seconds / max(brought.drafts, 1) / self.predicted([context], 0)


def predicted_costs(
    model: Model, layout: Layout, machine: Hardware | None = None, steps: int = Options.steps_per_dispatch
) -> Costs:
    """By what the cost model says of this model and its method of speculation on a machine, by default this one as it
    is known, in programs of so many decode steps."""
    passes = {drafts: layout.method(drafts).passes(model) for drafts in layout.choices}
    configs = {one.config for all_of_it in passes.values() for one in all_of_it}
    own = {config: step_times(model, layout, config, machine) for config in configs}
    proposing = {drafts: tuple((own[one.config], one.queries) for one in each) for drafts, each in passes.items()}
    layers = 0 if tree_of(layout.speculation) is None else len(pools_of(model, layout.speculation))
    times = step_times(model, layout, machine=machine, steps=steps)
    return Costs(layout, times, whole_row(layout), proposing, layers)

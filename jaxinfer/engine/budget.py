"""How many prompt tokens the next program may prefill: as many as the options leave beside sequences that decode, and
no more than the cost model allows.

A sequence that decodes gets one token of each program that prefills, and `steps_per_dispatch` at once of each program
of decode steps. A decode step of those who decode, predicted without prompts, is the steady time between their tokens.
A program that prefills beside them takes at most `Options.max_slowdown` times as long by prediction: no prompt, of
whatever length, makes the time between two of their tokens longer than that, and the gap before the tokens of a
program of decode steps stays what it is. The smallest bucket is always allowed, so that prefill goes on: where that
takes longer than the bound, its time is the bound.

The bound has its price, since large programs make more of the machine. Where nobody waits for single tokens,
`math.inf` is the choice, and the default of `Options`; a server's is 1.75.

Predicted is what the programs do, with their padding: the buckets of tokens and slots that are compiled. The sampler
and the host are not. Of a sequence that decodes the tokens count that were read: those on their way would only
lengthen the steady step.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Protocol

from jaxinfer.cache.gathers import gathers
from jaxinfer.decode.layout import Layout
from jaxinfer.decode.step import SCORED
from jaxinfer.engine.buckets import bucket, powers, rectangle
from jaxinfer.engine.options import SMALLEST_BUCKET, Options
from jaxinfer.engine.sequence import Sequence
from jaxinfer.machine import known_machine
from jaxinfer.model import Model, ModelConfig
from jaxinfer.roofline import Attended, Hardware, Mesh, Precision, StepTimes


class Times(Protocol):
    """What `jaxinfer.roofline.StepTimes` tells."""

    def decode(self, slots: int, reading: Attended, queries: int = 1, rows: int | None = None) -> float: ...
    def mixed(self, tokens: int, slots: int, reading: Attended, chunks: Attended) -> float: ...
    def rest(self, rows: int) -> float: ...
    def head(self, rows: int) -> float: ...
    def decoding(self, contexts: list[int], queries: int = 1) -> Attended: ...
    def chunk(self, tokens: int, cached: int) -> Attended: ...
    def kernels(self, count: int) -> float: ...


class Budget:
    """What programs may prefill.

    Attributes:
        most: tokens of one program, whatever its time.
    """

    def __init__(self, layout: Layout, options: Options, times: Times | None, whole_row: int | None = None):
        """Args:
        times: None leaves programs as long as they get.
        whole_row: see `attended`.
        """
        self.most = options.max_num_batched_tokens
        self._slots, self._slowdown, self._times = layout.slots, options.max_slowdown, times
        self._whole_row = whole_row

    def open(self, decoding: list[Sequence]) -> Allowance:
        """For the next program, in which these decode."""
        beside = len(decoding)
        if not decoding or self._times is None:
            return Allowance(self.most, beside)
        alone, contexts = rectangle(beside, self._slots), [len(sequence.tokens) for sequence in decoding]
        reading, beside_prompts = (
            self._times.decoding(attended(contexts, slots, self._whole_row)) for slots in (alone, self._slots)
        )
        room = self._slowdown * self._times.decode(alone, reading)
        return Allowance(self.most, beside, StepSeconds(self._times, self._slots, beside_prompts), room)


def predicted_budget(model: Model, layout: Layout, options: Options) -> Budget:
    """What programs may prefill, by what the cost model says of this model on this machine."""
    if layout.slots == 1 or options.max_slowdown == math.inf:  # no prompt comes beside a sequence that decodes
        return Budget(layout, options, times=None)
    times = step_times(model, layout, steps=options.steps_per_dispatch)
    return Budget(layout, options, times, whole_row(layout))


def step_times(
    model: Model, layout: Layout, config: ModelConfig | None = None, machine: Hardware | None = None,
    steps: int = Options.steps_per_dispatch,
) -> StepTimes:  # fmt: skip
    """What the cost model says of this model on its mesh of this machine's devices, as they are known; or of what
    proposes for it, another `config`, and of another machine.

    Args:
        steps: of a program of decode steps.
    """
    precision = Precision.all_in(model.config.dtype, layout.cache_dtype)
    decode, prefill = gathers(layout.attention, layout.ranks)
    mesh, circulates = Mesh(model.stages, model.tensor, layout.ranks), False
    if config is None:
        config, circulates = model.config, not (layout.speculation and layout.speculation.taps(model))
    else:
        config, mesh = _proposing(config, model, mesh)
    return StepTimes(
        config, machine or known_machine(precision.residual), precision, mesh,
        "materialized" if decode else "flash", "materialized" if prefill else "flash", circulates, steps,
    )  # fmt: skip


def _proposing(config: ModelConfig, model: Model, mesh: Mesh) -> tuple[ModelConfig, Mesh]:
    """What runs, and where: of the first layers of a model in a pipe all those of the stages that have them, but of
    the first stage no more than are asked for; any other model is in no pipe."""
    layers = config.num_layers
    if replace(config, layers=model.config.layers) != model.config:
        return config, replace(mesh, pipe=1)
    stages = -(-layers // model.per_stage)
    layers = layers if stages == 1 else stages * model.per_stage
    return replace(config, layers=model.config.layers[:layers]), replace(mesh, pipe=stages)


def whole_row(layout: Layout) -> int | None:
    """Tokens of a slot's row of pages, where decoding gathers all of it whatever it holds; None where it does not."""
    return layout.pages_per_row * layout.page_size if gathers(layout.attention)[0] else None


def attended(contexts: list[int], slots: int, whole_row: int | None) -> list[int]:
    """Tokens that a program of so many slots reads, for each: what its sequence holds, or a `whole_row` of every
    slot."""
    return contexts if whole_row is None else [whole_row] * slots


class StepSeconds:
    """The times of steps with prompts in an engine of `slots` slots, those that decode with this attention."""

    def __init__(self, times: Times, slots: int, reading: Attended):
        self.times, self._slots, self._reading = times, slots, reading

    def __call__(self, rows: int, chunks: Attended, scored: bool) -> float:
        """Of a step of `rows` rows with the attention of these chunks, and where asked for the rows' scores."""
        scores = self.times.rest(rows) + rows // SCORED * self.times.head(SCORED) if scored else 0.0
        return self.times.mixed(rows, self._slots, self._reading, chunks) + scores


class Allowance:
    """What one program may still prefill.

    Attributes:
        taken: rows that it has already: of sequences that decode, and of chunks.
    """

    def __init__(self, most: int, beside: int = 0, seconds: StepSeconds | None = None, room: float = math.inf):
        self.taken = beside
        self._most, self._seconds, self._room = most, seconds, room
        self._chunks, self._scored, self._empty = Attended(), False, True

    def tokens(self, start: int, wanted: int, scored: bool) -> int:
        """How many of the next `wanted` tokens after `start` may come with what is taken; for the first chunk at
        least one.

        Args:
            scored: whether their log-probabilities are wanted.
        """
        wanted = min(wanted, self._most - self.taken)
        if self._seconds is None or wanted <= 0:
            return wanted
        sizes = powers(SMALLEST_BUCKET, bucket(self.taken + wanted))
        for size in reversed(sizes):
            count = min(wanted, size - self.taken)
            if count <= 0:
                break
            attended = self._chunks.plus(self._seconds.times.chunk(count, start))
            if self._seconds(size, attended, scored or self._scored) <= self._room:
                return count
        return min(wanted, bucket(self.taken + 1) - self.taken) if self._empty else 0

    def take(self, start: int, tokens: int, scored: bool) -> None:
        """Counts a chunk."""
        self.taken += tokens
        self._empty = False
        if self._seconds is not None:
            self._chunks = self._chunks.plus(self._seconds.times.chunk(tokens, start))
            self._scored = self._scored or scored

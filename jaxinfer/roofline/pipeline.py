"""Steps of a model on a mesh: micro-batches that go from stage to stage.

In every tick each stage computes one micro-batch and hands it over. m micro-batches take m + p - 1 ticks through p
stages, of which a stage idles p - 1: the bubble is (p - 1) / (m + p - 1) (Huang et al. 2019, "GPipe", section 2).
Decode steps need not drain the pipe in between: with at least as many micro-batches as stages, the first one's next
token is known when the last one has left the first stage. That is the limit; predicted is a step of a program of
several, after which the pipe drains.

All stages run one program, so their layers are alike, and no stage embeds tokens or makes logits: that is done outside
the pipe, by all devices, each with its part of the vocabulary. A prompt's tokens come in and leave all at once; where
decode steps circulate, each tick embeds what enters and makes logits of what leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxinfer.roofline.attention import Attention
from jaxinfer.roofline.cost import Cost, Work
from jaxinfer.roofline.hardware import Hardware
from jaxinfer.roofline.mesh import Experts, Mesh, Share, check_mesh, stage_of, vocabulary_parts
from jaxinfer.roofline.precision import BF16, Precision
from jaxinfer.roofline.step import APART, decode_step, prefill

if TYPE_CHECKING:
    from jaxinfer.model.config import ModelConfig


STEPS = 8  # decode steps of a program, an engine's `steps_per_dispatch` by default
FEW_ROWS, MOST_PER_STAGE = 256, 4  # of `jaxinfer.parallel.pipeline`: rows of a micro-batch at least, and how many
NOTHING = Cost({}, 0)


@dataclass(frozen=True)
class Pipeline:
    """A step of one replica, on one device: of any stage, since all are alike.

    Attributes:
        stages: of the pipe.
        grid: what each micro-batch costs in a stage.
        apart: what is done once a step, outside the pipe.
        circulates: the next step follows without draining the pipe.
        tokens: that the step yields or reads, of all micro-batches.
    """

    stages: int
    grid: tuple[Cost, ...]
    apart: Cost
    circulates: bool
    tokens: int

    @property
    def microbatches(self) -> int:
        return len(self.grid)

    @property
    def bubble(self) -> float:
        """Part of its time that a stage idles, where the pipe drains after a step, or a program of decode steps."""
        steps = STEPS if self.circulates else 1
        ticks = (steps - 1) * self.period + self.microbatches + self.stages - 1
        return 1 - steps * self.microbatches / ticks

    @property
    def period(self) -> int:
        """Ticks of a step that another one follows."""
        return max(self.microbatches, self.stages) if self.circulates else self.microbatches + self.stages - 1

    def limit(self, hardware: Hardware) -> float:
        """Seconds of the step at the least."""
        return self._ticks(self.period, lambda cost: cost.limit(hardware)) + self.apart.limit(hardware)

    def predict(self, hardware: Hardware) -> float:
        """Seconds that the step is expected to take: the mean of a program's where the pipe does not drain within."""
        steps = STEPS if self.circulates else 1
        last = self._ticks(self.microbatches + self.stages - 1, lambda cost: cost.predict(hardware))
        others = self._ticks(self.period, lambda cost: cost.predict(hardware))
        return ((steps - 1) * others + last) / steps + self.apart.predict(hardware)

    def slowest(self, hardware: Hardware) -> Cost:
        """What the longest tick costs."""
        return max(self.grid, key=lambda cost: cost.limit(hardware))

    def collectives(self) -> dict[str, list[Work]]:
        """What one device sends in the whole step, by part, with an item for each micro-batch."""
        total: dict[str, list[Work]] = {}
        for name, part in (item for cost in (*self.grid, self.apart) for item in cost.parts.items()):
            if part.messages:
                total.setdefault(name, []).append(part)
        return total

    def _ticks(self, period: int, time: Callable[[Cost], float]) -> float:
        """Seconds of `period` ticks, after which the first micro-batch comes again. A stage that idles runs the same
        program; it waits for those that do not."""
        times = [time(cost) for cost in self.grid]
        total = 0.0
        for tick in range(period):
            batches = ((tick - stage) % period for stage in range(self.stages))
            total += max(times[batch] for batch in batches if batch < self.microbatches)
        return total


def circulating(rows: int, stages: int) -> int:
    """Micro-batches that decode steps of so many rows go round in: as few as keep all stages at work, and equally
    large, as `jaxinfer.parallel.pipeline.Round` has them."""
    return next((count for count in range(stages, rows) if rows % count == 0), rows)


def draining(rows: int, parts: int, stages: int) -> int:
    """Micro-batches of a step after which the pipe drains, as `jaxinfer.parallel.pipeline.microbatches` has them:
    large enough that reading the weights does not set their time, but no more than make the bubble small.

    Args:
        parts: into which the rows can be divided.
    """
    wanted, count = min(rows // FEW_ROWS, MOST_PER_STAGE * stages) if stages > 1 else 1, 1
    while 2 * count <= wanted and parts % (2 * count) == 0:
        count *= 2
    return count


def decode_on(
    config: ModelConfig, mesh: Mesh, batch: int, context: int, precision: Precision = BF16,
    attention: Attention = "flash", experts: Experts = "replicated", microbatches: int | None = None,
) -> Pipeline:  # fmt: skip
    """A decode step of one replica.

    Args:
        batch: sequences of all replicas, of which one has an equal part.
        microbatches: that a replica's sequences are split into; by default as the engine does it.

    Raises:
        ValueError: a count is out of its range, or the model does not spread over the mesh.
    """
    check_mesh(config, mesh)
    if batch < mesh.replicas:
        raise ValueError(f"batch is {batch}; it must be at least {mesh.replicas}, a sequence for each replica")
    own = -(-batch // mesh.replicas)
    count = circulating(own, mesh.pipe) if microbatches is None else microbatches
    if not 1 <= count <= own:
        raise ValueError(f"microbatches is {count}; it must be in 1..{own}, the sequences of a replica")

    stage, share = stage_of(config, mesh.pipe), share_of(config, mesh, experts)
    cost = decode_step(stage, -(-own // count), context, precision, mesh.tensor, 1, attention, share)
    return Pipeline(mesh.pipe, (cost,) * count, NOTHING, circulates=True, tokens=own)


def prefill_on(
    config: ModelConfig, mesh: Mesh, tokens: int, precision: Precision = BF16, attention: Attention = "flash",
    experts: Experts = "replicated", cached: int = 0,
) -> Pipeline:  # fmt: skip
    """A prefill of one prompt by one replica in one step, which a pipe takes in micro-batches as the engine does.

    Args:
        cached: tokens of the prompt before these, which earlier steps have prefilled.

    Raises:
        ValueError: a count is out of its range, or the model does not spread over the mesh.
    """
    check_mesh(config, mesh)
    stage, share = stage_of(config, mesh.pipe), share_of(config, mesh, experts)

    def cost(count: int, first: int) -> Cost:
        return prefill(stage, count, 1, cached + first, precision, mesh.tensor, "causal", attention, share)

    if mesh.pipe == 1:
        return Pipeline(1, (cost(tokens, 0),), NOTHING, circulates=False, tokens=tokens)
    rows = 1 << (tokens - 1).bit_length()  # as many as programs have
    each = -(-tokens // draining(rows, rows, mesh.pipe))
    grid = tuple(cost(min(each, tokens - first), first).without(*APART) for first in range(0, tokens, each))
    return Pipeline(mesh.pipe, grid, cost(tokens, 0).only(*APART), circulates=False, tokens=tokens)


def share_of(config: ModelConfig, mesh: Mesh, experts: Experts = "replicated") -> Share:
    """Of a device of any stage."""
    return Share(mesh.context, experts, mesh.pipe, vocabulary_parts(config, mesh))

"""Steps of a model on a mesh: micro-batches that go from stage to stage.

In every tick each stage computes one micro-batch and hands it over; a tick lasts as long as its slowest stage. m
micro-batches take m + p - 1 ticks through p stages, of which a stage idles p - 1: the bubble is (p - 1) / (m + p - 1)
(Huang et al. 2019, "GPipe", section 2). Decode steps need not drain the pipe in between: with at least as many
micro-batches as stages, the first one's next token is known when the last one has left the first stage. That is the
limit; predicted is a step of a program of several, after which the pipe drains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxinfer.roofline.attention import Attention
from jaxinfer.roofline.cost import Cost
from jaxinfer.roofline.hardware import Hardware
from jaxinfer.roofline.mesh import Experts, Mesh, Share, check_mesh, stages
from jaxinfer.roofline.precision import BF16, Precision
from jaxinfer.roofline.step import decode_step, prefill

if TYPE_CHECKING:
    from jaxinfer.model.config import ModelConfig


STEPS = 8  # decode steps of a program, an engine's `steps_per_dispatch` by default


@dataclass(frozen=True)
class Pipeline:
    """A step of one replica: what each micro-batch costs in each stage, on one device of it.

    Attributes:
        grid: costs by micro-batch, then by stage.
        circulates: the next step follows without draining the pipe.
        tokens: that the step yields or reads, of all micro-batches.
    """

    grid: tuple[tuple[Cost, ...], ...]
    circulates: bool
    tokens: int

    @property
    def microbatches(self) -> int:
        return len(self.grid)

    @property
    def bubble(self) -> float:
        """Part of its time that a stage idles, where the pipe drains after a step, or a program of decode steps."""
        steps = STEPS if self.circulates else 1
        ticks = (steps - 1) * self.period + self.microbatches + len(self.grid[0]) - 1
        return 1 - steps * self.microbatches / ticks

    @property
    def period(self) -> int:
        """Ticks of a step that another one follows."""
        stages = len(self.grid[0])
        return max(self.microbatches, stages) if self.circulates else self.microbatches + stages - 1

    def limit(self, hardware: Hardware) -> float:
        """Seconds of the step at the least."""
        return self._ticks(self.period, lambda cost: cost.limit(hardware))

    def predict(self, hardware: Hardware) -> float:
        """Seconds that the step is expected to take: the mean of a program's where the pipe does not drain within."""
        steps = STEPS if self.circulates else 1
        last = self._ticks(self.microbatches + len(self.grid[0]) - 1, lambda cost: cost.predict(hardware))
        others = self._ticks(self.period, lambda cost: cost.predict(hardware))
        return ((steps - 1) * others + last) / steps

    def slowest(self, hardware: Hardware) -> Cost:
        """What the stage of the longest tick costs."""
        return max((stage for stages in self.grid for stage in stages), key=lambda cost: cost.limit(hardware))

    def collectives(self) -> dict[str, tuple[float, int]]:
        """Bytes and messages that one device sends in the whole step, by part: of the stage that sends most."""
        stages = []
        for costs in zip(*self.grid, strict=True):
            total: dict[str, tuple[float, int]] = {}
            for name, part in (item for cost in costs for item in cost.parts.items() if item[1].messages):
                sent, messages = total.get(name, (0.0, 0))
                total[name] = (sent + part.sent, messages + part.messages)
            stages.append(total)
        return max(stages, key=lambda total: sum(sent for sent, _ in total.values()))

    def _ticks(self, period: int, time: Callable[[Cost], float]) -> float:
        """Seconds of `period` ticks, after which the first micro-batch comes again."""
        times = [[time(stage) for stage in stages] for stages in self.grid]
        total = 0.0
        for tick in range(period):
            places = ((stage, (tick - stage) % period) for stage in range(len(self.grid[0])))
            total += max(times[batch][stage] for stage, batch in places if batch < self.microbatches)
        return total


def decode_on(
    config: ModelConfig, mesh: Mesh, batch: int, context: int, precision: Precision = BF16,
    attention: Attention = "flash", experts: Experts = "replicated", microbatches: int | None = None,
) -> Pipeline:  # fmt: skip
    """A decode step of one replica.

    Args:
        batch: sequences of all replicas, of which one has an equal part.
        microbatches: that a replica's sequences are split into; by default as many as there are stages.

    Raises:
        ValueError: a count is out of its range, or the model does not spread over the mesh.
    """
    check_mesh(config, mesh)
    if batch < mesh.replicas:
        raise ValueError(f"batch is {batch}; it must be at least {mesh.replicas}, a sequence for each replica")
    own = -(-batch // mesh.replicas)
    count = min(mesh.pipe, own) if microbatches is None else microbatches
    if not 1 <= count <= own:
        raise ValueError(f"microbatches is {count}; it must be in 1..{own}, the sequences of a replica")

    row = tuple(
        decode_step(stage, -(-own // count), context, precision, mesh.tensor, 1, attention, share)
        for stage, share in _shares(config, mesh, experts)
    )
    return Pipeline((row,) * count, circulates=True, tokens=own)


def prefill_on(
    config: ModelConfig, mesh: Mesh, tokens: int, precision: Precision = BF16, attention: Attention = "flash",
    experts: Experts = "replicated", chunk: int | None = None,
) -> Pipeline:  # fmt: skip
    """A prefill of one prompt by one replica.

    Args:
        chunk: tokens of a micro-batch; None takes the prompt at once.

    Raises:
        ValueError: a count is out of its range, or the model does not spread over the mesh.
    """
    check_mesh(config, mesh)
    step = tokens if chunk is None else min(chunk, tokens)
    grid = tuple(
        tuple(
            prefill(stage, min(step, tokens - first), 1, first, precision, mesh.tensor, "causal", attention, share)
            for stage, share in _shares(config, mesh, experts)
        )
        for first in range(0, tokens, step)
    )
    return Pipeline(grid, circulates=False, tokens=tokens)


def _shares(config: ModelConfig, mesh: Mesh, experts: Experts) -> list[tuple[ModelConfig, Share]]:
    """Of a device of each stage: the first embeds, the last makes logits."""
    last = mesh.pipe - 1
    return [
        (stage, Share(mesh.context, experts, first=number == 0, last=number == last))
        for number, stage in enumerate(stages(config, mesh.pipe))
    ]

"""Ticks of a pipe that programs take: in each, every stage computes a micro-batch, or idles."""

from __future__ import annotations

from typing import NamedTuple

from jaxinfer.decode.step import Programs
from jaxinfer.parallel.pipeline import ticks


class Ticks(NamedTuple):
    """Of the model's own passes in one program.

    Attributes:
        total: from the first stage's first micro-batch to the last stage's last.
        filled: of these, those in which a stage has a micro-batch; all stages have equally many.
    """

    total: int = 0
    filled: int = 0


def ticks_of_step(programs: Programs, rows: int) -> Ticks:
    """Of a step of so many rows, prompts among them or not; none where there is no pipe."""
    model = programs.model
    return Ticks() if model.stages == 1 else _drained(model.microbatches(rows, rows), model.stages)


def ticks_of_loop(programs: Programs, slots: int, steps: int, drafts: int) -> Ticks:
    """Of decode steps alone.

    Args:
        drafts: how many proposed tokens may be right in each, one of the layout's `choices`; 0 decodes plainly.
    """
    model = programs.model
    if model.stages == 1:
        return Ticks()
    if not drafts and programs.circulates:
        rounds = model.rounds(slots, steps)
        return Ticks(rounds.ticks, steps * rounds.microbatches)
    queries = 1 + programs.layout.method(drafts).num_speculative_tokens if drafts else 1
    total, filled = _drained(model.microbatches(slots * queries, slots), model.stages)
    return Ticks(steps * total, steps * filled)


def _drained(microbatches: int, stages: int) -> Ticks:
    return Ticks(ticks(microbatches, stages), microbatches)

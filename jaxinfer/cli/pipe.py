"""What commands tell of a pipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxinfer.llm import LLM


def pipe_lines(llm: LLM) -> Iterator[str]:
    """One line where there is a pipe: how much of its time its stages idled, if all ticks are equally long."""
    if (stages := llm.model.stages) > 1:
        counters = llm.engine.counters
        yield f"pipe of {stages} stages: each idled in {counters.bubble:.1%} of {counters.pipe_ticks:,} ticks"

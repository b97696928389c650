"""What an engine has done, and what it holds, as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import zip_longest
from typing import Any

import numpy as np


@dataclass
class Counters:
    """What an engine has done since it was made.

    Attributes:
        preemptions: sequences that gave their pages back before they had ended.
        timeouts: requests that waited too long.
        prefix_queries: tokens of texts that were looked for in the cache, vLLM's `prefix_cache_queries`.
        prefix_hits: of these, tokens that were found.
        prefilled_tokens: tokens computed in chunks, those of a preempted sequence again.
        output_tokens: tokens told.
        drafts: how often tokens were proposed to a sequence.
        accepted: how often the first of them was right, the first two, and so on; not, where so many were not
            proposed.
        proposed: how often at most one of them might have been right, at most two, and so on.
        draft_updates: how often what proposes them was given other weights.
        pipe_ticks, pipe_filled: of all programs, see `jaxinfer.engine.pipe`; 0 without a pipe.
    """

    preemptions: int = 0
    timeouts: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prefilled_tokens: int = 0
    output_tokens: int = 0
    drafts: int = 0
    accepted: tuple[int, ...] = ()
    proposed: tuple[int, ...] = ()
    draft_updates: int = 0
    pipe_ticks: int = 0
    pipe_filled: int = 0

    def count_drafts(self, brought_Q: np.ndarray) -> None:
        """Counts what was proposed to a sequence in some steps.

        Args:
            brought_Q: steps in which the draw after none of the proposed tokens counted, that after one, and so on.
        """
        drafts, *accepted = brought_Q.tolist()
        self.drafts += drafts
        self.accepted = _plus(self.accepted, accepted)
        self.proposed = _plus(self.proposed, [*[0] * (len(accepted) - 1), drafts])

    def since(self, before: Counters) -> Counters:
        """What was done after `before`, a copy of these counters as they were."""

        def less(now: Any, then: Any) -> Any:
            return _plus(now, [-count for count in then]) if isinstance(now, tuple) else now - then

        counted: Any = map(less, astuple(self), astuple(before))
        return Counters(*counted)

    @property
    def bubble(self) -> float:
        """The part of all ticks in which a stage of a pipe idled; 0 without a pipe."""
        return 1 - self.pipe_filled / self.pipe_ticks if self.pipe_ticks else 0.0

    @property
    def tokens_per_draft(self) -> float:
        """Tokens of a step in which some were proposed, the model's own included; 0 where there was none."""
        return 1 + sum(self.accepted_by_position) if self.drafts else 0.0

    @property
    def accepted_by_position(self) -> tuple[float, ...]:
        """How often, of all proposals, the first token was right, the first two, and so on; empty without one."""
        return tuple(right / self.drafts for right in self.accepted)

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a draw of the model brought: 1, and those that were right before it."""
        drawn = self.output_tokens - sum(self.accepted)
        return self.output_tokens / drawn if drawn > 0 else 1.0


def _plus(counts: Sequence[int], more: Sequence[int]) -> tuple[int, ...]:
    return tuple(one + other for one, other in zip_longest(counts, more, fillvalue=0))


@dataclass(frozen=True)
class Metrics:
    """An engine at one moment.

    Attributes:
        counters: a copy.
        waiting: requests without a slot that want one, those preempted included.
        running: sequences that have a slot.
        pages_total: of all cache groups, without the null pages.
        pages_used: of them, those that sequences have.
        pages_cached: those that nobody has, whose text can be found; the rest is empty.
        evictions: cached pages that were taken away for other texts.
        wasted_slots: slots of used pages that hold no token.
        compilations: programs that were traced.
    """

    counters: Counters
    waiting: int
    running: int
    pages_total: int
    pages_used: int
    pages_cached: int
    evictions: int
    wasted_slots: int
    compilations: int

    @property
    def prefix_hit_rate(self) -> float:
        """Tokens found, of those looked for; 0 where none were."""
        return self.counters.prefix_hits / max(self.counters.prefix_queries, 1)

    @property
    def cache_use(self) -> float:
        """Fraction of the pages that sequences have."""
        return self.pages_used / self.pages_total


@dataclass(frozen=True)
class Warmed:
    """One program of an engine that was made ready, with all that belongs to it.

    Attributes:
        name: what it does, and its size.
        lowering: seconds to trace and lower it, kernels above all; 0 where that is part of `seconds`.
        seconds: to compile it or find it in the persistent compilation cache; others are compiled meanwhile.
        programs: XLA programs that it consists of, without those that were ready.
        found: of these, those that the cache had; the others were compiled.
    """

    name: str
    lowering: float
    seconds: float
    programs: int
    found: int


@dataclass(frozen=True)
class WarmUp:
    """What `Engine.warm_up` did.

    Attributes:
        warmed: all programs.
        seconds: from its beginning to its end.
        kernels: Pallas kernels in them, each counted once in a program.
    """

    warmed: tuple[Warmed, ...]
    seconds: float
    kernels: int

    @property
    def lowering(self) -> float:
        """Seconds in which programs and their kernels were traced and lowered."""
        return sum(one.lowering for one in self.warmed)

    @property
    def programs(self) -> int:
        return sum(one.programs for one in self.warmed)

    @property
    def found(self) -> int:
        return sum(one.found for one in self.warmed)

    def __str__(self) -> str:
        return (
            f"{self.programs} programs in {self.seconds:.1f} s, {self.found} of them from the cache; "
            f"{self.kernels} kernels, lowered with them in {self.lowering:.1f} s"
        )

"""A request as the engine keeps it, from its arrival to its end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxinfer.engine.page_keys import extend_keys
from jaxinfer.engine.request import Request, TokenLogprobs

if TYPE_CHECKING:
    from jaxinfer.engine.constraints import Constraint


@dataclass(eq=False)
class Sequence:
    """A request that waits, has a slot and pages, or has neither because its last tokens are on their way.

    0 <= prefilled <= goal <= tokens known; outputs <= scheduled; tokens known <= capacity.

    Attributes:
        request: what was asked.
        arrival: how many requests came before.
        queued: seconds from the request's arrival to the first slot; None where it has had none.
        slot: None for a sequence that does not run.
        tokens: the prompt, and of the output what was read.
        goal: tokens that prefill brings into the cache: the prompt, and after a preemption the output so far.
        prefilled: of them, those that were dispatched or found.
        scheduled: output tokens that were read, and those that dispatched programs bring at the least if none ends it.
        proposed: tokens that they may bring beyond that.
        in_flight: dispatched programs that have not been read.
        pages: of every cache group, in the order of the text. The null page stands for one that was given back, or
            was never needed, because no later query sees it.
        first: in every cache group, the first column of `pages` that is no such null page.
        told: columns of `pages` that the device knows.
        named: columns whose pages can be found by other sequences.
        keys: see `key`.
        prompt_logprobs: one entry per prompt token, as far as they were read.
        finished: nothing more is told of it.
        constraint: of its output; it has taken the output tokens that were read.
    """

    request: Request
    arrival: int = 0
    queued: float | None = None
    slot: int | None = None
    tokens: list[int] = field(init=False)
    goal: int = field(init=False)
    prefilled: int = 0
    scheduled: int = 0
    proposed: int = 0
    in_flight: int = 0
    pages: tuple[list[int], ...] = ()
    first: list[int] = field(default_factory=list)
    told: int = 0
    named: int = 0
    keys: list[bytes] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(init=False)
    finished: bool = False
    constraint: Constraint | None = None

    def __post_init__(self):
        self.tokens = list(self.request.prompt_ids)
        self.goal = len(self.tokens)
        self.prompt_logprobs = [None] * len(self.tokens)

    def start(self, slot: int, groups: int) -> None:
        """Takes a slot, with nothing in the cache; all that was known of the text is prefilled again."""
        self.slot, self.goal = slot, len(self.tokens)
        self.prefilled, self.scheduled = 0, self.outputs
        self.pages, self.first = tuple([] for _ in range(groups)), [0] * groups
        self.told = self.named = 0

    @property
    def rank(self) -> tuple[int, int]:
        """The lowest goes first."""
        return self.request.priority, self.arrival

    @property
    def outputs(self) -> int:
        """Output tokens that were read."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[len(self.request.prompt_ids) :]

    @property
    def prompt_left(self) -> int:
        return self.goal - self.prefilled

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are still to be told."""
        return self.request.params.prompt_logprobs is not None and self.outputs == 0

    @property
    def all_scheduled(self) -> bool:
        """Whether the last token that the request allows is on its way."""
        return self.scheduled >= self.request.params.max_tokens

    @property
    def decodes(self) -> bool:
        """Whether another decode step may bring a token that is not on its way already."""
        return self.prompt_left == 0 and not self.all_scheduled

    @property
    def length(self) -> int:
        """Tokens in the cache when all dispatched programs have run, at the least; without speculation the position of
        the next one's first query."""
        return self._cached(self.scheduled) if self.prompt_left == 0 else self.prefilled

    def length_after(self, tokens: int) -> int:
        """Tokens in the cache, at the most, after decode steps that bring at most so many more."""
        return self._cached(self.scheduled + self.proposed + tokens)

    def _cached(self, outputs: int) -> int:
        """Tokens in the cache with so many of the output, the newest of which never is in it."""
        return len(self.request.prompt_ids) + min(outputs, self.request.params.max_tokens) - 1

    @property
    def columns(self) -> int:
        """Pages of a cache group, those that were given back included."""
        return len(self.pages[0])

    def key(self, column: int, page_size: int) -> bytes:
        """What a page is found by, in every cache group. Only for a column of known tokens."""
        extend_keys(self.keys, self.tokens, page_size, column + 1)
        return self.keys[column]

    def check(self) -> None:
        assert 0 <= self.prefilled <= self.goal <= len(self.tokens), self
        assert 0 <= self.outputs <= self.scheduled, self
        assert self.proposed >= 0, self
        assert len(self.tokens) <= self.request.capacity, self


def constrained(sequences: Iterable[Sequence]) -> bool:
    """Whether the host has a say in what one of them draws."""
    return any(sequence.constraint is not None for sequence in sequences)


@dataclass(frozen=True)
class Chunk:
    """The next `tokens` tokens of a sequence that is prefilled."""

    sequence: Sequence
    start: int
    tokens: int

    @property
    def end(self) -> int:
        return self.start + self.tokens

    @property
    def last(self) -> bool:
        """Whether the first token of the output, or the next one, is drawn after it."""
        return self.end == self.sequence.goal

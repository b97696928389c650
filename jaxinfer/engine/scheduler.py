"""What runs next: which sequences have slots and pages, and which of their tokens the next program computes.

Sequences go by rank: lower priorities first, and within one first come, first served. Whoever is first by rank gets
what it needs, if necessary from the last, who then waits and computes its text again; so the first always goes on, and
every request ends. Those who wait take from nobody; what
a program may prefill goes by rank to those who run and, where slots and pages are free, to those who wait.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from heapq import merge

from jaxinfer.decode.arguments import is_integer
from jaxinfer.decode.layout import Layout
from jaxinfer.engine.budget import Allowance, Budget
from jaxinfer.engine.constraints import Constraint
from jaxinfer.engine.gate import Gate
from jaxinfer.engine.metrics import Counters
from jaxinfer.engine.options import Options
from jaxinfer.engine.paging import Paging
from jaxinfer.engine.request import Request
from jaxinfer.engine.sequence import Chunk, Sequence, constrained

Entry = tuple[int, int, int, int]  # of a page table: cache group, slot, column, page


@dataclass(frozen=True)
class Plan:
    """The next program, and what the device must know before it runs, in this order.

    Attributes:
        released: slots that decode no more.
        admitted: sequences that begin, and of which the device knows nothing yet.
        entries: of the page tables of the others.
        chunks: of texts that are prefilled; empty for decode steps alone.
        decoding: sequences that get a token in each step.
        steps: decode steps; 1 beside chunks, and where one of these has a constraint.
        drafts: proposed tokens that each of these may bring.
    """

    released: list[int]
    admitted: list[Sequence]
    entries: list[Entry]
    chunks: list[Chunk]
    decoding: list[Sequence]
    steps: int
    drafts: int


class Scheduler:
    """The queues of an engine, and the pages of those that run.

    Attributes:
        budget: what one program may prefill.
        gate: which programs propose tokens.
        waiting: sequences without a slot that want one, by rank.
        running: sequences by slot.
        sequences: all that have not ended, by request id. Those that neither wait nor run have all their tokens on
            their way.
    """

    def __init__(
        self, layout: Layout, windows: tuple[int | None, ...], options: Options, counters: Counters | None = None,
        budget: Budget | None = None, gate: Gate | None = None, clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self.slots, self.beyond, self.options, self.clock = layout.slots, layout.beyond, options, clock
        self.budget = budget or Budget(layout, options, times=None)
        self.gate = gate or Gate(layout)
        self.counters = counters or Counters()
        self.paging = Paging(layout, windows, options.enable_prefix_caching)
        self.waiting: list[Sequence] = []
        self.running: dict[int, Sequence] = {}
        self.sequences: dict[int, Sequence] = {}
        self._arrivals = 0

    # --- requests come and go

    def problems(self, request: Request) -> list[str]:
        """Why a request could never run, in words; empty if it can."""
        if not is_integer(request.priority):
            return [f"priority = {request.priority!r} must be an integer"]
        size, ahead = self.paging.page_size, self.options.most_ahead
        for group in range(len(self.paging.windows)):
            needed, usable = self.paging.most(group, request.capacity + self.beyond, ahead), self.paging.usable(group)
            if needed > usable:
                return [f"prompt and max_tokens need {needed} pages of {size} tokens; the cache has {usable}"]
        return []

    def add(self, request: Request, constraint: Constraint | None = None) -> None:
        sequence = Sequence(request, self._arrivals, constraint=constraint)
        self._arrivals += 1
        self.sequences[request.id] = sequence
        self._wait(sequence)

    def drop(self, request_id: int) -> int | None:
        """Ends a request, wherever it is, if it has not ended; returns the slot that it had."""
        if (sequence := self.sequences.get(request_id)) is None:
            return None
        slot = sequence.slot
        self.finish(sequence)
        return slot

    def expired(self) -> list[Sequence]:
        """Ends those that have waited too long for their first slot, and returns them."""
        if self.options.max_waiting_time is None:
            return []
        late = [sequence for sequence in self.waiting if sequence.queued is None and self.late(sequence.request)]
        for sequence in late:
            self.finish(sequence)
        return late

    def late(self, request: Request) -> bool:
        """Whether a request that has not begun to run has waited too long."""
        limit = self.options.max_waiting_time
        return limit is not None and self.clock() - request.arrived > limit

    def finish(self, sequence: Sequence) -> None:
        """Forgets a sequence. Its pages are free for programs yet to be scheduled, which run after those in flight."""
        sequence.finished = True
        del self.sequences[sequence.request.id]
        if sequence.slot is not None:
            self._vacate(sequence)
        elif self._waits(sequence):
            self._stop_waiting(sequence)

    def read(self, sequence: Sequence) -> None:
        """Output tokens were read: pages that they fill can be found. The newest is not in the cache."""
        if sequence.slot is not None:
            self.paging.name(sequence, min(sequence.length, len(sequence.tokens) - 1))

    # --- schedule

    def schedule(self) -> Plan:
        """Chooses the next program, and takes it for dispatched. It is empty if nothing can run."""
        self._let_go()
        decoding = [sequence for sequence in self._by_rank() if sequence.decodes]
        released = self._hold(decoding, 1)
        chunks, admitted = self._prefilled(_holding(decoding), released)
        decoding = _holding(decoding)
        # What a constrained sequence may draw next, the host knows only after its last token.
        steps = 1 if chunks or constrained(decoding) else self.options.steps_per_dispatch
        drafts = 0 if chunks or not decoding else self.gate.drafts(decoding)
        released += self._hold(decoding, steps * (1 + drafts), self.beyond if drafts else 0)
        decoding = _holding(decoding)
        continued = [chunk.sequence for chunk in chunks if chunk.sequence not in admitted]
        entries = [entry for sequence in (*decoding, *continued) for entry in self._entries(sequence)]
        for sequence in decoding:
            sequence.scheduled += steps
            sequence.proposed += steps * drafts
            sequence.in_flight += 1
        for sequence in admitted:
            sequence.told = sequence.columns
        for chunk in chunks:
            chunk.sequence.scheduled += chunk.last
            chunk.sequence.in_flight += 1
        return Plan(released, admitted, entries, chunks, decoding, steps, drafts)

    def _let_go(self) -> None:
        """Takes slots and pages from those who need no further program, before their last tokens are read."""
        for sequence in list(self.running.values()):
            if sequence.prompt_left == 0 and sequence.all_scheduled:
                self._vacate(sequence)

    def _hold(self, decoding: list[Sequence], tokens: int, beyond: int = 0) -> list[int]:
        """Gives all that decode the pages of so many more tokens, first by rank, and of `beyond` more that are only
        proposed; returns the slots that it took for that."""
        released = []
        for sequence in decoding:
            if sequence.slot is None:  # preempted
                continue
            self.paging.give_back_unseen(sequence)
            while sequence.slot is not None and not self.paging.grow(sequence, sequence.length_after(tokens) + beyond):
                assert len(self.running) > 1, "a request was admitted that the cache cannot hold"
                released.append(self._preempt(self._last()))
        return released

    def _prefilled(self, decoding: list[Sequence], released: list[int]) -> tuple[list[Chunk], list[Sequence]]:
        """The texts that are prefilled next, beside those that decode, and those among them that begin to run.

        Those that run and those that wait share what may be prefilled by rank. Where the first that waits finds no
        room, none that waits begins. Adds the slots that were taken for those that run to `released`; nobody begins
        when somebody was preempted.
        """
        chunks, admitted = [], []
        prompts = [sequence for sequence in self._by_rank() if sequence.prompt_left]
        if not self.waiting and not prompts:
            return chunks, admitted
        allowance = self.budget.open(decoding)
        first_to_wait, room = self.waiting[: self.slots - len(self.running)], True
        for sequence in merge(prompts, first_to_wait, key=_rank):
            if sequence.slot is not None:
                chunks += self._continue(sequence, allowance, released)
            elif room and not released:
                begun = self._admit(sequence, allowance)
                room = bool(begun)
                chunks += begun
                admitted += [chunk.sequence for chunk in begun]
        return chunks, admitted

    def _continue(self, sequence: Sequence, allowance: Allowance, released: list[int]) -> list[Chunk]:
        """The next chunk of one that runs, if some of it may be prefilled; pages that it lacks come from the last."""
        if not _allowed(sequence, allowance):
            return []
        while (chunk := self._chunk(sequence, allowance)) is None and self._last() is not sequence:
            released.append(self._preempt(self._last()))
        return [] if chunk is None else [chunk]

    def _chunk(self, sequence: Sequence, allowance: Allowance) -> Chunk | None:
        """As much of a sequence's text as may come next and the pages allow."""
        self.paging.give_back_unseen(sequence)
        start = sequence.prefilled
        end = self.paging.reach(sequence, start + _allowed(sequence, allowance))
        if end <= start:
            return None
        grown = self.paging.grow(sequence, end)
        assert grown
        sequence.prefilled = end
        self.paging.name(sequence, end)
        self.counters.prefilled_tokens += end - start
        allowance.take(start, end - start, sequence.scores_prompt)
        return Chunk(sequence, start, end - start)

    def _admit(self, sequence: Sequence, allowance: Allowance) -> list[Chunk]:
        """Gives the first that waits the lowest free slot and the pages that can be found for it, if there is room and
        some of it may be prefilled; returns its first chunk, if so.

        One that was preempted first waits for the tokens that are on their way.
        """
        if sequence.in_flight:
            return []
        paging, spare = self.paging, self._spare()
        if not allowance.tokens(0, 1, False):
            return []
        if self.running and min(spare) < 1:  # not worth a look for what could be found
            return []
        found = paging.found(sequence)
        start = found * paging.page_size
        if not allowance.tokens(start, len(sequence.tokens) - start, sequence.scores_prompt):
            return []
        costs = paging.costs(sequence, found, self.budget.most)
        if self.running and any(cost > left for cost, left in zip(costs, spare, strict=True)):
            return []
        self._stop_waiting(sequence)
        slot = next(slot for slot in range(self.slots) if slot not in self.running)
        sequence.start(slot, len(paging.windows))
        if sequence.queued is None:
            sequence.queued = self.clock() - sequence.request.arrived
        self.running[slot] = sequence
        paging.begin(sequence, found)
        if paging.sharing and not sequence.scores_prompt:
            self.counters.prefix_queries += len(sequence.tokens)
            self.counters.prefix_hits += sequence.prefilled
        chunk = self._chunk(sequence, allowance)
        assert chunk is not None, "a sequence was admitted without a page"
        return [chunk]

    def _spare(self) -> list[int]:
        """Pages of every pool that remain beside what those who run have yet to prefill and one more page for each of
        them. Whoever begins with more would soon be preempted."""
        spare = [pool.available for pool in self.paging.pools]
        for other in self.running.values():
            to_come = self.paging.to_come(other, self.budget.most)
            spare = [left - promised for left, promised in zip(spare, to_come, strict=True)]
        return spare

    def _preempt(self, sequence: Sequence) -> int:
        """Takes slot and pages from a sequence, which waits for new ones; returns the slot."""
        slot = self._vacate(sequence)
        self._wait(sequence)
        self.counters.preemptions += 1
        return slot

    def _entries(self, sequence: Sequence) -> list[Entry]:
        """What is new in a sequence's page tables."""
        assert sequence.slot is not None
        columns = range(sequence.told, sequence.columns)
        sequence.told = sequence.columns
        return [
            (group, sequence.slot, column, pages[column])
            for group, pages in enumerate(sequence.pages)
            for column in columns
        ]

    # --- who is where

    def _by_rank(self) -> list[Sequence]:
        return sorted(self.running.values(), key=_rank)

    def _last(self) -> Sequence:
        return max(self.running.values(), key=_rank)

    def _vacate(self, sequence: Sequence) -> int:
        slot = sequence.slot
        assert slot is not None
        del self.running[slot]
        self.paging.give_back(sequence)
        sequence.slot = None
        return slot

    def _wait(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_rank)

    def _waits(self, sequence: Sequence) -> bool:
        place = bisect_left(self.waiting, sequence.rank, key=_rank)
        return place < len(self.waiting) and self.waiting[place] is sequence

    def _stop_waiting(self, sequence: Sequence) -> None:
        del self.waiting[bisect_left(self.waiting, sequence.rank, key=_rank)]


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


def _holding(sequences: list[Sequence]) -> list[Sequence]:
    """Those that still have a slot."""
    return [sequence for sequence in sequences if sequence.slot is not None]


def _allowed(sequence: Sequence, allowance: Allowance) -> int:
    """Tokens of a sequence that may come next."""
    return allowance.tokens(sequence.prefilled, sequence.prompt_left, sequence.scores_prompt)

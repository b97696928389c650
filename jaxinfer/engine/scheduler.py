"""What runs next: requests into slots, prompts into chunks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from jaxinfer.decode.batch import Prefill
from jaxinfer.decode.step import Layout
from jaxinfer.engine.pages import PagePool
from jaxinfer.engine.request import Request, Sequence


@dataclass(frozen=True)
class Chunk:
    """The next `tokens` tokens of a sequence's prompt."""

    sequence: Sequence
    start: int
    tokens: int


class Scheduler:
    """First come, first served: a request runs as soon as a slot and pages for its longest outcome are free."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Sequence] = {}
        self.pools = tuple(PagePool(count) for count in layout.num_pages)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def drop(self, request_id: int) -> Sequence | None:
        """Forgets a request that waits, or finishes one that runs and returns its sequence."""
        self.waiting = deque(request for request in self.waiting if request.id != request_id)
        found = [sequence for sequence in self.running.values() if sequence.request.id == request_id]
        for sequence in found:
            self.finish(sequence)
        return found[0] if found else None

    @property
    def requests(self) -> list[Request]:
        """All that run or wait."""
        return [*(sequence.request for sequence in self.running.values()), *self.waiting]

    def pages_needed(self, request: Request) -> int:
        return -(-request.capacity // self.layout.page_size)

    def admit(self) -> Sequence | None:
        """Gives the longest waiting request the lowest free slot, if it and its pages are free."""
        free = [slot for slot in range(self.layout.slots) if slot not in self.running]
        if not self.waiting or not free:
            return None
        needed = self.pages_needed(self.waiting[0])
        if any(pool.free < needed for pool in self.pools):
            return None
        pages = tuple(pool.allocate(needed) for pool in self.pools)
        sequence = Sequence(self.waiting.popleft(), free[0], pages)
        self.running[sequence.slot] = sequence
        return sequence

    def chunks(self, budget: int) -> list[Chunk]:
        """The prompt tokens that go next, at most `budget` of them, oldest sequences first."""
        chosen = []
        for sequence in self.running.values():
            tokens = min(sequence.prompt_left, budget)
            if tokens > 0:
                chosen.append(Chunk(sequence, sequence.prefilled, tokens))
                budget -= tokens
        return chosen

    def decoding(self) -> list[Sequence]:
        return [sequence for sequence in self.running.values() if sequence.decodes]

    def finish(self, sequence: Sequence) -> None:
        """Frees slot and pages. Steps in flight may still name them, but run before any step that is yet to come."""
        sequence.finished = True
        del self.running[sequence.slot]
        for pool, pages in zip(self.pools, sequence.pages, strict=True):
            pool.give_back(pages)


def lay_out(chunks: list[Chunk], tokens: int, slots: int) -> Prefill:
    """Chunks as the ragged part of a step, padded to `tokens` rows and `slots` chunks."""
    prefill = Prefill(
        tokens_T=np.zeros(tokens, np.int32),
        starts_R1=np.zeros(slots + 1, np.int32),
        slots_R=np.full(slots, slots, np.int32),
        lengths_R=np.zeros(slots, np.int32),
        last_R=np.zeros(slots, np.int32),
    )
    row = 0
    for index, chunk in enumerate(chunks):
        end = chunk.start + chunk.tokens
        prefill.tokens_T[row : row + chunk.tokens] = chunk.sequence.request.prompt_ids[chunk.start : end]
        row += chunk.tokens
        prefill.slots_R[index] = chunk.sequence.slot
        prefill.lengths_R[index] = end
        prefill.last_R[index] = end == len(chunk.sequence.request.prompt_ids)
        prefill.starts_R1[index + 1] = row
    prefill.starts_R1[len(chunks) + 1 :] = row
    return prefill


def next_tokens(chunks: list[Chunk], tokens: int) -> np.ndarray:
    """For each row of the ragged part the prompt token that follows it, -1 where none does."""
    targets_T, row = np.full(tokens, -1, np.int32), 0
    for chunk in chunks:
        following = chunk.sequence.request.prompt_ids[chunk.start + 1 : chunk.start + chunk.tokens + 1]
        targets_T[row : row + len(following)] = following
        row += chunk.tokens
    return targets_T

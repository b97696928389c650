"""Requests whose output must look like something: what the engine asks of a constraint, and when it is ready."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from functools import partial
from typing import Protocol, Self

import numpy as np

from jaxinfer.decode.masks import NOTHING_BARRED, allows, no_masks
from jaxinfer.decode.structured_params import StructuredOutputsParams
from jaxinfer.engine.request import Request, Update
from jaxinfer.engine.sequence import Sequence

_Problem = tuple[Sequence, BaseException]
THREADS = 8  # that make constraints, and as many that make masks: both leave Python's lock alone
BRIEFLY = 0.01  # seconds that an idle engine waits at a time, before whoever drives it may add or abort something
TOGETHER = 8  # masks that one of them makes, or those of one output: most take 20 us, and a thread is no sooner there

logger = logging.getLogger(__name__)


class Constraint(Protocol):
    """Says which tokens may follow those of one output.

    Attributes:
        failed: why it can say no more, in a sentence; its mask then allows only the end of the output, whose reason
            is `constraint`.
    """

    failed: str | None

    def mask(self) -> np.ndarray:
        """Bits of the tokens that may come next, as uint32 words of `jaxinfer.decode.masks`."""
        ...

    def accept(self, token: int) -> None:
        """Takes the next token of the output."""
        ...

    def copy(self) -> Self:
        """Another one of the same output, which may go on otherwise."""
        ...


Constrain = Callable[[StructuredOutputsParams], Constraint]
"""Makes a constraint of what a request asks for, in any thread; raises ValueError where there is none."""


class Constraints:
    """Makes constraints beside the steps, which a large schema could otherwise hold up, and asks them for masks."""

    def __init__(self, constrain: Constrain | None):
        self._constrain = constrain
        self._pool = futures.ThreadPoolExecutor(THREADS, "jaxinfer-constraints")
        # A step waits for masks: they must not queue behind constraints, each of which may take seconds.
        self._masking = futures.ThreadPoolExecutor(THREADS, "jaxinfer-masks")
        self._making: dict[int, tuple[Request, futures.Future[Constraint]]] = {}

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._making

    def __len__(self) -> int:
        return len(self._making)

    @property
    def possible(self) -> bool:
        return self._constrain is not None

    def add(self, request: Request) -> None:
        """Begins to make a request's constraint."""
        assert self._constrain is not None
        assert request.params.structured_outputs is not None
        self._making[request.id] = request, self._pool.submit(self._constrain, request.params.structured_outputs)

    def drop(self, request_id: int) -> None:
        self._making.pop(request_id, None)

    def drop_if(self, condition: Callable[[Request], bool]) -> list[Request]:
        """Drops requests by a condition, and returns them."""
        dropped = [request for request, _ in self._making.values() if condition(request)]
        for request in dropped:
            self.drop(request.id)
        return dropped

    def ready(self, wait: bool) -> Iterator[tuple[Request, Constraint | Update]]:
        """Requests whose constraint is made, or with what is to be told where it cannot be; waits for one on demand,
        but never for long."""
        if wait and self._making:
            making = [making for _, making in self._making.values()]
            futures.wait(making, BRIEFLY, return_when=futures.FIRST_COMPLETED)
        for request, making in [entry for entry in self._making.values() if entry[1].done()]:
            del self._making[request.id]
            try:
                made = making.result()
            except ValueError as error:
                made = Update(request, (), (), None, "constraint", problem=str(error))
            except Exception:  # of this request alone: the others go on
                logger.exception("the constraint of request %d cannot be made", request.id)
                made = Update(request, (), (), None, "error")
            yield request, made

    def masks(
        self, drawing: Iterable[tuple[int, Sequence]], vocab: int, drafts_Bk: np.ndarray, parents_Bk: np.ndarray
    ) -> tuple[np.ndarray, list[_Problem]]:
        """The masks of a step, and the sequences whose constraint failed at that, with what it raised.

        Masks are uint32 [B x (k + 1), U]: of every slot's draw after its newest token, and after each proposed one.
        Those of a sequence that failed bar nothing: its draws are of no more use.

        Args:
            drawing: sequences that draw, by their rows in the proposals.
            drafts_Bk: tokens that are proposed; k may be 0.
            parents_Bk: which of them each follows, as `Tree.parents`.
        """
        slots, queries = drafts_Bk.shape[0], drafts_Bk.shape[1] + 1
        words_WU = no_masks(slots * queries, vocab)
        words_BQU = words_WU.reshape(slots, queries, -1)
        checks = [
            partial(_problem, one, drafts_Bk[row], parents_Bk[row], words_BQU[row])
            for row, one in drawing
            if one.constraint is not None and not one.finished
        ]
        size = max(TOGETHER // queries, 1)
        together = [checks[at : at + size] for at in range(0, len(checks), size)]
        problems = [problem for some in self._masking.map(_call, together) for problem in some]
        return words_WU, [problem for problem in problems if problem is not None]


def _problem(sequence: Sequence, drafts_k: np.ndarray, parents_k: np.ndarray, words_QU: np.ndarray) -> _Problem | None:
    """Writes the masks of one sequence's draws, or none where its constraint raises, which is returned with it."""
    assert sequence.constraint is not None
    try:
        _check(sequence.constraint, sequence.request.stop_ids, drafts_k, parents_k, words_QU)
    except BaseException as error:  # a panic of compiled code is no Exception, and nobody interrupts these threads
        words_QU[:] = NOTHING_BARRED
        return sequence, error
    return None


def _check(
    constraint: Constraint, stop_ids: frozenset[int], drafts_k: np.ndarray, parents_k: np.ndarray, words_QU: np.ndarray
) -> None:
    """Writes the masks of one output's draws. Of those after a token that may not come where it is proposed, or that
    ends the output, nothing is said: such a token is never drawn there, or is the last.

    Args:
        words_QU: masks that bar nothing.
    """
    words_QU[0] = constraint.mask()
    parents = parents_k.tolist()
    last = {parent: node for node, parent in enumerate(parents)}
    after: dict[int, Constraint] = {-1: constraint}
    for node, (token, parent) in enumerate(zip(drafts_k.tolist(), parents, strict=True)):
        if parent in after and token not in stop_ids and allows(words_QU[parent + 1], token):
            before = after[parent]
            own = before if parent >= 0 and last[parent] == node else before.copy()  # nobody else goes on from there
            own.accept(token)
            words_QU[node + 1] = own.mask()
            after[node] = own


def _call(checks: Iterable[Callable[[], _Problem | None]]) -> list[_Problem | None]:
    return [check() for check in checks]

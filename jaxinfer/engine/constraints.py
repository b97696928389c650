"""Requests whose output must look like something: what the engine asks of a constraint, and when it is ready."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from itertools import chain
from typing import Protocol

import numpy as np

from jaxinfer.decode.masks import no_masks
from jaxinfer.decode.structured_params import StructuredOutputsParams
from jaxinfer.engine.request import Request, Update
from jaxinfer.engine.sequence import Sequence

THREADS = 8  # that make constraints, and as many that make masks: both leave Python's lock alone
BRIEFLY = 0.01  # seconds that an idle engine waits at a time, before whoever drives it may add or abort something
TOGETHER = 8  # masks that one of them makes: most take 20 us, and a thread is no sooner there

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

    def masks(self, drawing: Iterable[Sequence], slots: int, vocab: int) -> np.ndarray:
        """The masks of all slots, uint32 [B, U], for a step in which these sequences draw a token."""
        words_BU = no_masks(slots, vocab)
        constrained = [one for one in drawing if one.constraint is not None and not one.finished]
        together = [constrained[at : at + TOGETHER] for at in range(0, len(constrained), TOGETHER)]
        for sequence, words_U in zip(constrained, chain(*self._masking.map(_masks, together)), strict=True):
            words_BU[sequence.slot] = words_U
        return words_BU


def _masks(sequences: list[Sequence]) -> list[np.ndarray]:
    return [one.constraint.mask() for one in sequences if one.constraint is not None]

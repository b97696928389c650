"""The HTTP process's side of the engine, in all its replicas: requests out, tokens in, and text from tokens.

Everything here runs in the event loop's thread; messages of the engine are brought there.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from jaxinfer.continuation import Continuation
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Request
from jaxinfer.intake import Intake
from jaxinfer.outputs import CompletionOutput
from jaxinfer.serve.errors import ApiError, given_up, refused
from jaxinfer.serve.messages import Abort, Add, Refused, Step, Tokens
from jaxinfer.serve.metrics import Metrics
from jaxinfer.serve.router import Router, Seat

_SMOOTH = 0.1  # weight of the newest request in the mean duration
_LONGEST_RETRY = 60  # seconds

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Group:
    """The continuations that one HTTP request asked for, by their index among its choices.

    Attributes:
        started: when the caller asked, by `time.monotonic`.
        spelled: names of fields that the caller used, where they are others than the sampler's.
    """

    client: Client
    continuations: list[Continuation]
    started: float
    spelled: dict[str, str] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    error: ApiError | None = None

    async def pieces(self) -> AsyncIterator[CompletionOutput]:
        """New text and tokens as they come; a reader that is slow gets longer pieces.

        Raises:
            ApiError: the engine refused or lost a continuation. The others of the group have ended then, too.
        """
        open_ones = list(self.continuations)
        while open_ones:
            await self._change()
            for continuation in list(open_ones):
                if self.error is not None:  # it may also come while the reader has a piece
                    raise self.error
                if (piece := continuation.piece()) is not None:
                    if piece.finish_reason is not None:
                        open_ones.remove(continuation)
                    yield piece

    async def outputs(self) -> list[CompletionOutput]:
        """The whole of every continuation, when all have ended; raises as `pieces`."""
        while self.error is None and any(one.finish_reason is None for one in self.continuations):
            await self._change()
        if self.error is not None:
            raise self.error
        return [continuation.output() for continuation in self.continuations]

    async def _change(self) -> None:
        await self.changed.wait()
        self.changed.clear()

    @property
    def new_tokens(self) -> int:
        return sum(len(continuation.token_ids) for continuation in self.continuations)

    def close(self) -> None:
        """Drops what still runs: the answer is written, or nobody waits for it any more."""
        self.client.drop(self)


@dataclass(eq=False)
class _Running:
    """A continuation in the engine, the group that waits for it, its replica, and when its last tokens came."""

    group: Group
    continuation: Continuation
    seat: Seat
    last: float | None = None


class Client:
    """Queues requests with the engine processes, and gives what they bring to those who wait.

    Attributes:
        closed: what new requests are told, when no more are taken.
    """

    def __init__(
        self,
        send: Callable[[int, Any], None],
        intake: Intake,
        router: Router,
        max_waiting: int,
        metrics: Metrics,
    ):
        """Args:
        send: to the engine process of a replica, by its number.
        router: of the replicas.
        max_waiting: continuations that may wait besides those that run.
        """
        self.intake, self.metrics = intake, metrics
        self._send, self._router, self._capacity = send, router, router.slots + max_waiting
        self._running: dict[int, _Running] = {}
        self._groups: set[Group] = set()
        self._kept = 0  # places
        self._ids, self._seeds = count(), np.random.default_rng()
        self._mean_seconds = 1.0
        self.closed: ApiError | None = None

    # --- requests out

    @contextmanager
    def places(self, wanted: int) -> Iterator[None]:
        """Keeps places for continuations while their prompts are tokenized; `start` takes them after that.

        Raises:
            ApiError: as `start`.
        """
        self._check_room(wanted)
        self._kept += wanted
        try:
            yield
        finally:
            self._kept -= wanted

    def start(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, priority: int = 0,
        arrived: float | None = None, spelled: dict[str, str] | None = None,
    ) -> Group:  # fmt: skip
        """Queues the n continuations of every prompt; those of the first prompt come first.

        Args:
            priority: the lower, the sooner the engine lets them run.
            arrived: when the caller asked, by `time.monotonic`; by default now.
            spelled: as in `Group`.

        Raises:
            ApiError: they are more than the queue has room for, now or ever, or the server takes none any more.
        """
        self._check_room(len(prompts) * params.n)
        arrived = time.monotonic() if arrived is None else arrived
        group, sent = Group(self, [], arrived, spelled or {}), defaultdict[int, list[Request]](list)
        for ids in prompts:
            seed = int(self._seeds.integers(2**32)) if params.seed is None else params.seed
            requests = self.intake.requests(self._ids, ids, params, seed, priority, arrived)
            for request, seat in zip(requests, self._router.place(ids, params.n), strict=True):
                continuation = Continuation.start(request, len(group.continuations), self.intake.tokenizer)
                group.continuations.append(continuation)
                self._running[request.id] = _Running(group, continuation, seat)
                sent[seat.replica].append(request)
        self._groups.add(group)
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        for replica, requests in sent.items():
            self._send(replica, Add(tuple(requests)))
        return group

    def _check_room(self, wanted: int) -> None:
        if self.closed is not None:
            raise self.closed
        if wanted > self._capacity:
            raise ApiError(
                400, f"prompts times n are {wanted}; this server takes at most {self._capacity} at once", param="n"
            )
        taken = len(self._running) + self._kept
        if taken + wanted > self._capacity:
            rounds = (taken + wanted - self._router.slots) / self._router.slots
            seconds = min(_LONGEST_RETRY, max(1, math.ceil(rounds * self._mean_seconds)))
            raise ApiError(
                429,
                f"the queue is full: {taken} requests run or wait, at most {self._capacity} may; "
                f"try again in {seconds} s",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )

    def drop(self, group: Group) -> None:
        """Forgets a group; what it still has in the engine is aborted."""
        self._groups.discard(group)
        dropped = defaultdict[int, list[int]](list)
        for name in [one.request.id for one in group.continuations if one.request.id in self._running]:
            dropped[self._leave(name).seat.replica].append(name)
            self.metrics.requests.labels("abort").inc()
        for replica, names in dropped.items():
            self._send(replica, Abort(tuple(names)))

    def _leave(self, name: int) -> _Running:
        """Forgets a continuation that ends."""
        running = self._running.pop(name)
        continuation = running.continuation
        self._router.leave(running.seat, (*continuation.request.prompt_ids, *continuation.token_ids))
        return running

    @property
    def idle(self) -> bool:
        """Whether nobody waits for an answer."""
        return not self._groups

    def close(self, status: int, message: str) -> None:
        """Takes no more requests, and tells those who come this."""
        self.closed = ApiError(status, message, code="shutting_down", headers={"Retry-After": "5"})

    def fail_all(self, status: int, message: str) -> None:
        """Ends every request with an error."""
        for group in list(self._groups):
            self._fail(group, ApiError(status, message, code="aborted"))

    # --- tokens in

    def receive(self, message: Step | Refused, replica: int = 0) -> None:
        """Takes a message of a replica's engine process."""
        match message:
            case Refused():
                if message.id in self._running:
                    running = self._leave(message.id)
                    self._fail(running.group, refused([message.message], "prompt", running.group.spelled))
            case Step():
                self.metrics.hold(message.engine, replica)
                now = time.monotonic()
                stopped = [entry.id for entry in message.tokens if self._push(entry, now)]
                if stopped:
                    self._send(replica, Abort(tuple(stopped)))

    def _push(self, entry: Tokens, now: float) -> bool:
        """Gives tokens to their continuation; true where that has ended, and the engine does not know."""
        if (running := self._running.get(entry.id)) is None:
            return False  # dropped meanwhile
        continuation, group = running.continuation, running.group
        try:
            continuation.push(entry.update(continuation.request))
        except Exception:  # of this request alone: the others go on
            logger.exception("the text of request %d cannot be made", entry.id)
            self._fail(group, ApiError(500, "the text of this request cannot be made", code="internal_error"))
            return False
        self._router.grow(running.seat, len(entry.tokens))
        self._time(running, entry, now)
        if (error := given_up(continuation.finish_reason, continuation.problem, group.spelled)) is not None:
            self._ended(entry.id, continuation)
            self._fail(group, error)
            return False
        group.changed.set()
        if continuation.finish_reason is None:
            return False
        self._ended(entry.id, continuation)
        self.metrics.whole.observe(now - group.started)
        self._mean_seconds += _SMOOTH * (now - group.started - self._mean_seconds)
        return entry.finish_reason is None

    def _ended(self, name: int, continuation: Continuation) -> None:
        self._leave(name)
        self.metrics.requests.labels(continuation.finish_reason).inc()

    def _time(self, running: _Running, entry: Tokens, now: float) -> None:
        if not (tokens := len(entry.tokens)):
            return
        self.metrics.tokens.inc(tokens)
        if entry.queued is not None:
            self.metrics.queued.observe(entry.queued)
        if running.last is None:
            self.metrics.first_token.observe(now - running.group.started)
        else:
            self.metrics.between.observe((now - running.last) / tokens)
        running.last = now

    def _fail(self, group: Group, error: ApiError) -> None:
        self.drop(group)
        group.error = error
        group.changed.set()

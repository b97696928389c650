"""Processes that share a model: the first leads, the others do as it says.

All of them run the same programs in the same order, or none would end: a collective waits for all devices. What the
leader runs it therefore tells the others first. Who dies, fails or falls silent ends all, with a line that says why: a
program that waits for a process which is gone cannot be stopped, so the process that runs it ends.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self

import jax

from jaxinfer.parallel.wire import Wire, WireError

SILENCE = 30.0  # seconds without a word after which a process counts as dead
BEATS = 5.0  # seconds between words of those who have nothing to say
_VERDICT = 2.0  # seconds in which the end of another process is noticed, where the device sees it first
_BEAT, _CALL, _FACTS, _DIFFER, _FAILED, _END = "beat", "call", "facts", "differ", "failed", "end"


def end_process(problem: str) -> None:
    """What the end of a group means unless somebody wishes otherwise."""
    print(f"error: {problem}", file=sys.stderr, flush=True)
    os._exit(1)


class Group:
    """This process among those that share a model; see `join`.

    It is a context: an exception that leaves it ends the others, who are told its first line; without one they end in
    order.

    Attributes:
        process, processes: which of how many this is; 0 leads.
        ended: is called in a thread of the group, once, with the reason why the group cannot go on, and must end the
            process.
    """

    def __init__(
        self, process: int, processes: int, wires: Mapping[int, Wire], names: Mapping[int, str], start: float
    ):
        """Begins to listen and to send signs of life.

        Args:
            wires: to every other process for the leader, to the leader for the others; secure.
            names: of their hosts.
            start: seconds that a process may take from one point of the start to the next.
        """
        self.process, self.processes = process, processes
        self.ended: Callable[[str], None] = end_process
        self._wires, self._names, self._start = dict(wires), dict(names), start
        self._inboxes = {other: SimpleQueue[Any]() for other in wires}
        self._over, self._differ, self._lock = False, False, threading.Lock()
        self._stop = threading.Event()
        self._listeners = [
            threading.Thread(target=self._listen, args=(other,), name=f"process-{other}", daemon=True)
            for other in wires
        ]
        for wire in wires.values():
            wire.patience(SILENCE)
        for thread in (*self._listeners, threading.Thread(target=self._beat, daemon=True)):
            thread.start()

    @property
    def leads(self) -> bool:
        return self.process == 0

    def __str__(self) -> str:
        return f"process {self.process} of {self.processes}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.leave()
            return
        self.settle()
        self.leave(str(error).strip().partition("\n")[0] or type(error).__name__)

    @contextmanager
    def leaving_only_by_error(self) -> Iterator[None]:
        """As the context itself, but the group goes on after the block."""
        try:
            yield
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    # --- what the processes say to each other

    def agree(self, facts: Mapping[str, str]) -> None:
        """Compares what must be the same in all processes, each of which calls this.

        Raises:
            ValueError: names what differs, and both values.
            TimeoutError: a process did not come to this.
        """
        if not self.leads:
            self._wires[0].send((_FACTS, dict(facts)))
            problem = self._taken(0)
        else:
            found = [differences(facts, self._taken(other), self._named(other)) for other in self._wires]
            problem = "; ".join(filter(None, found))
            if problem:
                self._differ = self._begin_end()
            self._tell_all((_DIFFER if problem else _FACTS, problem))
        if problem:
            raise ValueError(problem)

    def call(self, name: str, *arguments: Any) -> None:
        """The leader's: tells all others what it runs now."""
        for other, wire in self._wires.items():
            try:
                wire.send((_CALL, (name, *arguments)))
            except WireError as error:
                self._lost(f"{self._named(other)} {error}")

    def next_call(self) -> tuple[Any, ...] | None:
        """The others': waits for what the leader runs next; None when it has ended in order."""
        return self._inboxes[0].get()

    # --- the end

    def leave(self, problem: str | None = None) -> None:
        """Ends the group for this process. In order, the leader does when the others have run what they were told, and
        these when the leader has. A problem all are told."""
        if problem is None and not self.leads and not self._over:
            self.next_call()  # there is none: who is still told something has left too early, and is missed
        if self._begin_end():
            if problem is not None:
                self._tell_all((_FAILED, f"process {self.process} failed: {problem}"))
                self._outlast(_VERDICT)
            elif self.leads:
                self._tell_all((_END, None))
                self._outlast(SILENCE)
        self._stop.set()
        for wire in self._wires.values():
            wire.close()
        if problem is None or self._differ:
            jax.distributed.shutdown()

    def fail(self, problem: str) -> None:
        """Ends the group and this process: it did not run what the others run."""
        self.settle()
        self._lost(problem)

    def settle(self) -> None:
        """After an error: where something failed because another process is gone, the group ends meanwhile, and says
        so."""
        if not self._over:
            time.sleep(_VERDICT)

    def _lost(self, problem: str) -> None:
        """The group cannot go on."""
        if self._begin_end():
            self._tell_all((_FAILED, problem))
            self._outlast(_VERDICT)
            self.ended(f"{problem}; the group of {self.processes} processes ends")

    def _outlast(self, seconds: float) -> None:
        """The leader's: until the others are gone, so long at most. JAX aborts those that are left without it."""
        if self.leads:
            deadline = time.monotonic() + seconds
            for listener in self._listeners:
                if listener is not threading.current_thread():
                    listener.join(max(0, deadline - time.monotonic()))

    def _begin_end(self) -> bool:
        """Whether nobody has yet."""
        with self._lock:
            first, self._over = not self._over, True
        return first

    def _tell_all(self, message: tuple[str, Any]) -> None:
        for wire in self._wires.values():
            with suppress(WireError):  # its own listener finds the same
                wire.send(message)

    # --- threads

    def _listen(self, other: int) -> None:
        while True:
            try:
                kind, content = self._wires[other].receive()
            except WireError as error:
                self._lost(f"{self._named(other)} {error}")
                return
            if kind == _FAILED:
                self._lost(content)
                return
            if kind in (_DIFFER, _END):  # before the connection is closed
                self._differ = self._begin_end() and kind == _DIFFER
                content = content if self._differ else None
            if kind != _BEAT:
                self._inboxes[other].put(content)

    def _beat(self) -> None:
        while not self._stop.wait(BEATS):
            self._tell_all((_BEAT, None))

    def _taken(self, other: int) -> Any:
        """The next that a process said."""
        try:
            return self._inboxes[other].get(timeout=self._start)
        except Empty:
            raise TimeoutError(
                f"{self._named(other)} has not told its options within {self._start:g} s, the timeout of a start; "
                "does it still download the checkpoint?"
            ) from None

    def _named(self, other: int) -> str:
        return f"process {other} on {self._names[other]}"


def differences(ours: Mapping[str, str], theirs: Mapping[str, str], named: str) -> str:
    """What differs between the leader and another process, with both values; empty where nothing does."""
    absent = "absent"
    found = [
        f"{name} is {ours.get(name, absent)} on process 0 and {theirs.get(name, absent)} on {named}"
        for name in dict.fromkeys((*ours, *theirs))
        if ours.get(name) != theirs.get(name)
    ]
    return "; ".join(found)

"""The engine processes, one for each replica: from their start until they are ready, and their ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from jaxinfer.logs import shown
from jaxinfer.serve import worker
from jaxinfer.serve.messages import Failed, Following, Ready, Setup, Stop, Warming

GRACE = 5  # seconds for what was told to end
STOPPING = (signal.SIGTERM, signal.SIGINT)
WAKES = 0.2  # seconds; a signal that comes just before Python begins to wait is minded when that ends


class StoppedError(Exception):
    """A signal said to stop before all engine processes were ready."""


class StartError(Exception):
    """An engine process could not load its model; says why."""

    def __init__(self, failed: Failed):
        super().__init__(failed.message)
        self.failed = failed


@dataclass(frozen=True, eq=False)
class EngineProcess:
    """An engine process, and the HTTP process's side of the pipe to it.

    Attributes:
        named: what begins a line about it: nothing for an only one.
    """

    process: BaseProcess
    connection: Connection
    named: str = ""

    def told(self) -> Warming | Ready | Following:
        """The next that it tells before it is ready, and that.

        Raises:
            StartError: it failed, or died without a word.
        """
        try:
            told = self.connection.recv()
        except (EOFError, OSError):  # the latter where it died within a message
            raise StartError(self.died()) from None
        if isinstance(told, Failed):
            raise StartError(self.failed(told))
        return told

    def stop(self) -> None:
        """Tells it to end, whatever it does, as long as there is no `Channel` to it."""
        with contextlib.suppress(OSError):  # it has ended
            self.connection.send(Stop())

    def failed(self, failed: Failed) -> Failed:
        """What it said of its end, with its name, unless that is an error in what all were given."""
        return failed if failed.reason == "input" else replace(failed, message=self.named + failed.message)

    def died(self) -> Failed:
        """What can be said of its end when it ended without a word. Waits for it."""
        self.process.join(GRACE)
        code = self.process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = "; the system ends processes so when its memory is used up" if -code == signal.SIGKILL else ""
            return self.failed(Failed("memory" if hint else "device", f"the engine process was ended by {name}{hint}"))
        return self.failed(Failed("device", f"the engine process ended with exit code {code}; its log above says why"))


@contextlib.contextmanager
def stop_signals() -> Iterator[Connection]:
    """While what is served still loads: the first SIGTERM or Ctrl-C comes as a message, the second ends this process,
    with exit code 0."""
    here, there = multiprocessing.Pipe(duplex=False)

    def told(number: int, _: object) -> None:
        if here.poll():
            raise SystemExit(0)
        there.send(number)

    before = {number: signal.signal(number, told) for number in STOPPING}
    with here, there:
        try:
            yield here
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def engine_processes(setups: Sequence[Setup]) -> Iterator[list[EngineProcess]]:
    """An engine process for each setup while they are needed. Ctrl-C ends them, too."""
    engines: list[EngineProcess] = []
    try:
        for index, setup in enumerate(setups):
            engines.append(_start(setup, f"replica {index}: " if len(setups) > 1 else ""))
        yield engines
        deadline = time.monotonic() + GRACE
        for engine in engines:
            while engine.process.is_alive() and (left := deadline - time.monotonic()) > 0:
                engine.process.join(min(left, WAKES))
    finally:
        for engine in engines:
            engine.process.kill()
            engine.process.join()


def _start(setup: Setup, named: str) -> EngineProcess:
    context = multiprocessing.get_context("spawn")  # JAX must not be forked
    here, there = context.Pipe()
    arguments = worker.main, named, there, setup, time.monotonic()
    process = context.Process(target=_run, args=arguments, name="jaxinfer-engine")
    process.start()
    there.close()
    return EngineProcess(process, here, named)


def _run(main: Callable[..., None], named: str, *arguments: Any) -> None:
    """In the engine process: it shows which kernels run. All else that it says comes as messages."""
    with shown("pallas_kernels", "jaxinfer.machine", named=named):
        main(*arguments)


def wait_until_ready(
    engines: Sequence[EngineProcess], warming: Callable[[Warming], None], stop: Connection | None = None
) -> list[Ready | Following]:
    """What the engine processes tell when their model is loaded and compiled, in their order.

    Args:
        warming: is told of each program that is ready before, in any of them, and how many these are in all.
        stop: of `stop_signals`.

    Raises:
        StoppedError: there is a message at `stop`.
        StartError: the first of them that failed, or died without a word.
    """
    ready: dict[EngineProcess, Ready | Following] = {}
    waiting: dict[Any, EngineProcess] = {engine.connection: engine for engine in engines}
    while len(ready) < len(engines):
        speaking = wait([*waiting, *([] if stop is None else [stop])], WAKES)
        if stop in speaking:
            raise StoppedError
        for speaks in speaking:
            engine = waiting[speaks]
            if engine in ready:  # and has died since
                raise StartError(engine.died())
            told = engine.told()
            if isinstance(told, Warming):
                warming(replace(told, total=len(engines) * told.total))
            else:
                ready[engine] = told
                waiting[engine.process.sentinel] = waiting.pop(speaks)
    return [ready[engine] for engine in engines]


def wait_for_leader(engine: EngineProcess, say: Callable[[str], None], told: Connection) -> int:
    """Waits while an engine process follows that of another host. A signal to end is for that to obey, which may let
    requests end; a second one is obeyed here.

    Args:
        told: of `stop_signals`, where the first signal may be already.

    Returns:
        the exit code: 0 after the leader has stopped, or 1.
    """
    asked = []

    def stop(*_: object) -> None:
        if asked:
            raise SystemExit(1)
        asked.append(True)
        say("stopping when process 0 does; another signal ends it now, and the group with it")

    for number in STOPPING:
        signal.signal(number, stop)
    if told.poll():
        stop()
    try:
        while not engine.connection.poll(WAKES):
            pass
        failed = engine.connection.recv()
    except (EOFError, OSError):
        engine.process.join(GRACE)
        if engine.process.exitcode == 0:
            return 0
        failed = engine.died()
    say(f"error: {failed.message}")
    return 1

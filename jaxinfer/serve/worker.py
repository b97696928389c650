"""The engine process: it loads the model, drives `Engine.step`, and takes requests between steps.

The HTTP process imports this module, so that it can start the others; JAX is imported only there.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NoReturn

from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Metrics, Request, Warmed, WarmUp
from jaxinfer.engine.request import Watch
from jaxinfer.serve.channel import Channel
from jaxinfer.serve.devices import VISIBLE
from jaxinfer.serve.messages import (
    Abort,
    Add,
    Failed,
    Following,
    Loading,
    Ready,
    Refused,
    Setup,
    Step,
    Stop,
    Tokens,
    Warming,
)

if TYPE_CHECKING:
    from jaxinfer.engine import Engine
    from jaxinfer.llm import LLM
    from jaxinfer.parallel import Group

FLUSH = 60  # seconds for the last words: the other side reads at once, unless it is stopped
FAILURES = 3  # steps in a row that may fail on the host before the engine is given up

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model, how long it took to load it, and what was compiled for it; None where that is left to the requests."""

    llm: LLM
    loading: Loading
    warm_up: WarmUp | None


def main(connection: Connection, setup: Setup, ordered: float) -> None:
    """Runs the engine until it is told to stop, or the HTTP process is gone; exits with 1 after an error.

    Args:
        ordered: when this process was, by `time.monotonic`.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the HTTP process says when to stop
        signal.signal(number, signal.SIG_IGN)
    if setup.devices is not None:
        os.environ[VISIBLE] = setup.devices  # before JAX looks for devices
    inbox: SimpleQueue[Any] = SimpleQueue()
    channel = Channel(connection, inbox.put, ended=lambda: os._exit(1))

    def progress(warmed: Warmed, total: int) -> None:
        channel.send(Warming(warmed, total))
        if not inbox.empty():  # with `Stop`: nothing else comes before the engine is ready
            sys.exit(0)

    def end(problem: str) -> NoReturn:
        channel.send(Failed("device", problem))
        channel.flush(FLUSH)
        os._exit(1)

    loaded = load(setup, ordered, progress, end)
    if isinstance(loaded, Failed):
        channel.send(loaded)
        channel.flush(FLUSH)
        sys.exit(1)
    settle()
    failed = _follow(loaded, channel) if loaded.llm.follows else _lead(loaded, inbox, channel)
    channel.flush(FLUSH)
    sys.exit(failed)


def _lead(loaded: Loaded, inbox: SimpleQueue[Any], channel: Channel) -> int:
    """Works until told to stop; ends the other processes that share the model, too."""
    channel.send(ready(loaded))
    group = loaded.llm.group
    failed = Worker(loaded.llm.engine, inbox, channel.send, loaded.llm.watch, group and group.settle).run()
    if group is not None:
        group.leave("its engine cannot go on" if failed else None)
    return failed


def _follow(loaded: Loaded, channel: Channel) -> int:
    """Runs what process 0 runs, until that stops."""
    assert loaded.llm.group is not None
    channel.send(Following(str(loaded.llm.group), loaded.loading))
    with loaded.llm.group:
        loaded.llm.follow()
    return 0


def load(
    setup: Setup, ordered: float, progress: Callable[[Warmed, int], None], ended: Callable[[str], None] | None = None
) -> Loaded | Failed:
    """The model, with what was compiled for it, or what is wrong with it, the options or the machine.

    Args:
        ordered: when the process was that loads it.
        progress: is told of each program that is ready; see `Engine.warm_up`.
        ended: of the group of processes that share the model; see `Group.ended`.
    """
    import jax

    from jaxinfer.engine.memory import NoRoomError, is_out_of_memory
    from jaxinfer.machine import keep_compiled
    from jaxinfer.parallel import join

    imported = time.monotonic()
    keep_compiled()
    try:
        if setup.group is None:
            return _loaded(setup, None, ordered, imported, progress)
        group = join(**setup.group)
        group.ended = ended or group.ended
        with group.leaving_only_by_error():
            return _loaded(setup, group, ordered, imported, progress)
    except NoRoomError as error:
        return Failed("memory", str(error), _device())
    except (ValueError, OSError) as error:
        return Failed("input", str(error))
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return Failed("memory", _first_line(error), _device())


def _loaded(
    setup: Setup, group: Group | None, ordered: float, imported: float, progress: Callable[[Warmed, int], None]
) -> Loaded:
    import jax

    from jaxinfer.decode.speculative import by_name
    from jaxinfer.engine import Options
    from jaxinfer.llm import DEMO, LLM

    jax.devices()
    found = time.monotonic()
    model = DEMO if setup.model is None else setup.model
    options = Options(**setup.options, speculation=by_name(**setup.speculation))
    llm = LLM(model, options=options, group=group, **setup.llm)
    llm.watch = None if setup.watch is None else setup.watch(llm.engine)
    loading = Loading(imported - ordered, found - imported, time.monotonic() - found)
    warms = setup.warm_up and (group is None or group.leads)  # who follows compiles what it is told
    return Loaded(llm, loading, llm.engine.warm_up(progress) if warms else None)


def settle() -> None:
    """What there is lives as long as this process: the collector of cycles need not go over it again and again, for a
    fifth of a second each time, in which no token is sent."""
    gc.collect()
    gc.freeze()


def ready(loaded: Loaded) -> Ready:
    """What the HTTP process must know of the model."""
    llm = loaded.llm
    limits, options = llm.intake.limits, llm.engine.options
    return Ready(
        folder=str(llm.folder),
        vocab_size=limits.vocab_size,
        context=limits.context,
        eos_ids=limits.eos_ids,
        longest=longest(llm.engine, limits.context),
        max_num_seqs=options.max_num_seqs,
        page_size=options.page_size,
        pages=max(llm.engine.layout.num_pages) - 1 if options.enable_prefix_caching else 0,
        loading=loaded.loading,
        warm_up=loaded.warm_up,
    )


def longest(engine: Engine, context: int) -> int:
    """Tokens of prompt and output that one request can have, by what the engine says of it: at most `context`."""
    low, high = 1, context
    while low < high:
        middle = (low + high + 1) // 2
        request = Request(-1, (0,), SamplingParams(max_tokens=middle - 1), (), 0)
        low, high = (low, middle - 1) if engine.problems(request) else (middle, high)
    return low


class _GivenUpError(Exception):
    """The engine cannot go on; says why."""


class Worker:
    """Drives an engine by the messages in `inbox`, and answers with `send`; `watch` is told after that, and `failed`
    is called at an error of the device."""

    def __init__(
        self, engine: Engine, inbox: SimpleQueue[Any], send: Callable[[Any], None], watch: Watch | None = None,
        failed: Callable[[], None] | None = None,
    ):  # fmt: skip
        self._failed = failed or (lambda: None)
        self._engine, self._inbox, self._send, self._watch = engine, inbox, send, watch
        self._failures = 0
        self._told: Metrics | None = None

    def run(self) -> int:
        """Works until it is told to stop (0), or the engine cannot go on (1)."""
        try:
            self._tell([])
            while self._take():
                self._step()
        except _GivenUpError as error:
            self._send(Failed("device", str(error), _device()))
            return 1
        return 0

    def _take(self) -> bool:
        """Takes all messages that there are, and waits for one where nothing runs; False when told to stop."""
        wait = not self._engine.busy
        while True:
            try:
                message = self._inbox.get(block=wait)
            except Empty:
                return True
            if isinstance(message, Stop):
                return False
            self._obey(message)
            wait = False

    def _obey(self, message: Add | Abort) -> None:
        if isinstance(message, Abort):
            with self._surviving("an abort failed; what ran is aborted"):
                self._engine.abort(*message.ids)
            return
        for request in message.requests:
            try:
                self._engine.add(request)
            except Exception as error:  # of this request alone: the others go on
                if not isinstance(error, ValueError):
                    logger.exception("request %d cannot be queued", request.id)
                self._send(Refused(request.id, str(error)))

    def _step(self) -> None:
        """Runs the engine once and tells what that brought."""
        updates = None
        with self._surviving("a step failed; what ran is aborted"):
            updates = self._engine.step()
        if updates is None:
            return
        self._tell([Tokens.of(update) for update in updates])
        with self._surviving("what watches the steps failed at one"):
            if self._watch is not None:
                self._watch(updates)
                self._tell([])
            self._failures = 0

    @contextmanager
    def _surviving(self, problem: str) -> Iterator[None]:
        """For what may fail on the host now and then: an engine has begun afresh then, and all goes on.

        Args:
            problem: for the log.

        Raises:
            _GivenUpError: the device failed, or the host again and again.
        """
        import jax

        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            self._failed()
            raise _GivenUpError(f"the device failed: {_first_line(error)}") from error
        except Exception as error:
            logger.exception(problem)
            self._failures += 1
            if self._failures == FAILURES:
                raise _GivenUpError(f"{FAILURES} steps in a row failed: {_first_line(error)}") from error

    def _tell(self, tokens: list[Tokens]) -> None:
        now = self._engine.metrics
        if tokens or now != self._told:
            self._send(Step(tuple(tokens), now))
            self._told = now


def _device() -> tuple[str, str, int]:
    import jax

    from jaxinfer.engine.memory import memory_of

    device = jax.local_devices()[0]
    return device.device_kind, device.platform, memory_of(device)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]

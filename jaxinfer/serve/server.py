"""The HTTP process: it starts the engine's, serves until it is told to stop, and ends them all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import uvicorn

from jaxinfer.intake import Intake, Limits
from jaxinfer.serve import processes
from jaxinfer.serve.app import Service, make_app
from jaxinfer.serve.channel import Channel
from jaxinfer.serve.client import Client
from jaxinfer.serve.http import Protocol
from jaxinfer.serve.messages import Failed, Following, Ready, Refused, Setup, Step, Stop, Warming
from jaxinfer.serve.metrics import Metrics
from jaxinfer.serve.processes import (
    GRACE,
    STOPPING,
    EngineProcess,
    StartError,
    StoppedError,
    engine_processes,
    stop_signals,
    wait_for_leader,
    wait_until_ready,
)
from jaxinfer.serve.prompts import Prompts, template_or_reason
from jaxinfer.serve.router import Replica, Router
from jaxinfer.text import Tokenizer

_POLL = 0.05  # seconds between looks at who still waits, while the server drains
_LAST = 2 * GRACE  # seconds for the engine processes, and for what threads still read
_STOPPING = "the server is shutting down"


@dataclass(frozen=True)
class Settings:
    """How the server serves.

    Attributes:
        name: of the model.
        max_waiting: continuations that may wait for a replica, before callers are told to come again later.
        shutdown_timeout: seconds that running requests have to end after SIGTERM.
        ssl_certfile, ssl_keyfile: for TLS, both or none.
    """

    name: str
    max_waiting: int = 256
    shutdown_timeout: float = 30
    api_key: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, on which nothing listens yet.

    Raises:
        OSError: the address is in use, or none of this machine's.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def listen(bound: socket.socket) -> None:
    """Takes callers on a socket that `bind` gave.

    Raises:
        StartError: another process bound the address meanwhile, which the system allows, and was ready first.
    """
    try:
        bound.listen()
    except OSError as error:
        host, port = bound.getsockname()[:2]
        raise StartError(Failed("input", f"cannot listen on port {port} of {host}: {error.strerror}")) from error


def run(
    setups: Sequence[Setup], settings: Settings, bound: socket.socket, say: Callable[[str], None],
    warming: Callable[[Warming], None],
) -> int:  # fmt: skip
    """Serves on `bound` until SIGTERM or Ctrl-C, or where the model's engine follows that of another host, does as it
    is told by that, and leaves `bound` alone; `say` takes lines for the terminal, `warming` what is compiled.

    Args:
        setups: of the replicas: one model with the same options, each on devices of its own.

    Returns:
        the exit code: 0 after a stop that was asked for, be it while the engines load, 1 where one failed.

    Raises:
        StartError: an engine process could not start, or the address is taken meanwhile.
    """
    with stop_signals() as stop, engine_processes(setups) as engines:
        try:
            told = wait_until_ready(engines, warming, stop)
        except StoppedError:
            say(f"stopping: what loads has {processes.GRACE:g} s to end; another signal ends it now")
            for engine in engines:
                engine.stop()
            return 0
        ready = []
        for engine, one in zip(engines, told, strict=True):
            if isinstance(one, Following):  # which only a single engine does
                say(f"{one.loading}; {one.which} follows process 0, where the server is")
                return wait_for_leader(engine, say, stop)
            ready.append(one)
            say(f"{engine.named}{one.loading}")
            if one.warm_up is not None:
                say(f"{engine.named}{one.warm_up}")
        listen(bound)
        return asyncio.run(_Serving(ready, settings, engines, _address(bound, settings), say).serve(bound, stop))


class _Server(uvicorn.Server):
    """Uvicorn, which tells when it listens, and leaves signals to `_Serving`."""

    def __init__(self, config: uvicorn.Config, listens: Callable[[], None]):
        super().__init__(config)
        self._listens = listens

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listens()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Serving:
    """A server from its first request to its last."""

    def __init__(
        self, ready: Sequence[Ready], settings: Settings, engines: Sequence[EngineProcess],
        address: str, say: Callable[[str], None],
    ):  # fmt: skip
        self._settings, self._engines, self._say = settings, engines, say
        first = ready[0]  # of one model, and therefore alike but for what the devices have room for
        tokenizer = Tokenizer.from_folder(first.folder)
        intake = Intake(tokenizer, Limits(first.vocab_size, first.context, first.eos_ids))
        router = Router([Replica(one.max_num_seqs, one.pages) for one in ready], first.page_size)
        self._client = Client(self._send, intake, router, settings.max_waiting, Metrics())
        prompts = Prompts(intake, template_or_reason(first.folder), min(one.longest for one in ready))
        service = Service(settings.name, self._client, prompts, int(time.time()))
        self._server = _Server(
            uvicorn.Config(
                make_app(service, settings.api_key),
                http=Protocol,
                log_level="warning",
                access_log=False,
                ssl_certfile=settings.ssl_certfile,
                ssl_keyfile=settings.ssl_keyfile,
                timeout_graceful_shutdown=GRACE,
                server_header=False,
            ),
            listens=lambda: say(f"serving {settings.name} at {address}"),
        )
        self._code, self._over = 0, False
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, bound: socket.socket, stop: Connection) -> int:
        """Args:
        stop: has a message where a signal came before those of the loop are minded.
        """
        self._loop = asyncio.get_running_loop()
        self._channels = [
            Channel(
                engine.connection,
                receive=partial(self._post, self._receive, index),
                ended=partial(self._end_of, engine),
            )
            for index, engine in enumerate(self._engines)
        ]
        for number in STOPPING:
            self._loop.add_signal_handler(number, self._stop)
        if stop.poll():
            self._stop()
        await self._server.serve(sockets=[bound])
        self._over = True
        for channel in self._channels:
            channel.send(Stop())
        for channel in self._channels:
            channel.flush(GRACE)
        _end_within(_LAST, self._code)
        return self._code

    # --- to and from the engine processes

    def _send(self, replica: int, message: Any) -> None:
        self._channels[replica].send(message)

    def _post(self, call: Callable[..., None], *arguments: Any) -> None:
        """Makes a call in the loop's thread; what the engine still says after the last request, nobody needs."""
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop is closed
            if not self._over:
                raise

    def _receive(self, replica: int, message: Step | Refused | Failed) -> None:
        if isinstance(message, Failed):
            self._fail(self._engines[replica].failed(message))
        else:
            self._client.receive(message, replica)

    def _end_of(self, engine: EngineProcess) -> None:
        """In the thread of its channel, not the loop's: an end may be waited for."""
        if not self._over:
            self._post(self._lost, engine.died())

    def _lost(self, failed: Failed) -> None:
        if not self._over and not self._code:
            self._fail(failed)

    def _fail(self, failed: Failed) -> None:
        """Ends the server: it has no replica to spare, and without an engine there is nothing to serve."""
        self._code = 1
        self._say(f"error: {failed.message}")
        self._client.close(503, "the engine failed; the server is ending")
        self._client.fail_all(500, "the engine failed while the request ran")
        self._server.should_exit = True

    # --- signals

    def _stop(self) -> None:
        """The first signal lets what runs end, the second does not."""
        if self._draining is None:
            self._draining = self._loop.create_task(self._drain())
        else:
            self._end()

    async def _drain(self) -> None:
        seconds = self._settings.shutdown_timeout
        self._client.close(503, _STOPPING)
        self._say(f"stopping: what runs has {seconds:g} s to end; another signal ends it now")
        deadline = self._loop.time() + seconds
        while not self._client.idle and self._loop.time() < deadline:
            await asyncio.sleep(_POLL)
        self._end()

    def _end(self) -> None:
        self._client.fail_all(503, "the server was shut down before the request ended")
        self._server.should_exit = True


def _end_within(seconds: float, code: int) -> None:
    """Ends this process after so long, if it has not ended by itself: Python waits for all threads at its end, one of
    which may be at a grammar that nobody needs any more."""
    watch = threading.Timer(seconds, os._exit, (code,))
    watch.daemon = True
    watch.start()


def _address(bound: socket.socket, settings: Settings) -> str:
    host, port = bound.getsockname()[:2]
    return f"{'https' if settings.ssl_certfile else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

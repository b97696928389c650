"""The HTTP process: it starts the engine's, serves until it is told to stop, and ends both."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import uvicorn

from jaxinfer.intake import Intake, Limits
from jaxinfer.serve import worker
from jaxinfer.serve.app import Service, make_app
from jaxinfer.serve.channel import Channel
from jaxinfer.serve.client import Client
from jaxinfer.serve.http import Protocol
from jaxinfer.serve.messages import Failed, Ready, Refused, Setup, Step, Stop, Warming
from jaxinfer.serve.metrics import Metrics
from jaxinfer.serve.prompts import Prompts, template_or_reason
from jaxinfer.text import Tokenizer

_POLL = 0.05  # seconds between looks at who still waits, while the server drains
_GRACE = 5  # seconds for what was told to end
_STOPPING = "the server is shutting down"


@dataclass(frozen=True)
class Settings:
    """How the server serves.

    Attributes:
        name: of the model.
        max_waiting: continuations that may wait for the engine, before callers are told to come again later.
        shutdown_timeout: seconds that running requests have to end after SIGTERM.
        ssl_certfile, ssl_keyfile: for TLS, both or none.
    """

    name: str
    max_waiting: int = 256
    shutdown_timeout: float = 30
    api_key: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None


class StartError(Exception):
    """The engine process could not load its model; says why."""

    def __init__(self, failed: Failed):
        super().__init__(failed.message)
        self.failed = failed


@contextlib.contextmanager
def engine_process(setup: Setup) -> Iterator[tuple[BaseProcess, Connection]]:
    """The engine process while it is needed, and this side of the pipe to it. Ctrl-C ends it, too."""
    context = multiprocessing.get_context("spawn")  # JAX must not be forked
    here, there = context.Pipe()
    process = context.Process(target=worker.main, args=(there, setup, time.monotonic()), name="jaxinfer-engine")
    process.start()
    there.close()
    try:
        yield process, here
        process.join(_GRACE)
    finally:
        process.kill()
        process.join()


def wait_until_ready(process: BaseProcess, connection: Connection, warming: Callable[[Warming], None]) -> Ready:
    """What the engine process tells when the model is loaded and compiled.

    Args:
        warming: is told of each program that is ready before.

    Raises:
        StartError: it failed, or died without a word.
    """
    try:
        while isinstance(told := connection.recv(), Warming):
            warming(told)
    except EOFError:
        process.join()
        raise StartError(died(process)) from None
    if isinstance(told, Failed):
        raise StartError(told)
    return told


def died(process: BaseProcess) -> Failed:
    """What can be said of an engine process that ended without a word."""
    code = process.exitcode
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = "; the system ends processes so when its memory is used up" if -code == signal.SIGKILL else ""
        return Failed("memory" if hint else "device", f"the engine process was ended by {name}{hint}")
    return Failed("device", f"the engine process ended with exit code {code}; its log above says why")


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
    setup: Setup, settings: Settings, bound: socket.socket, say: Callable[[str], None],
    warming: Callable[[Warming], None],
) -> int:  # fmt: skip
    """Serves on `bound` until SIGTERM or Ctrl-C; `say` takes lines for the terminal, `warming` what is compiled.

    Returns:
        the exit code: 0 after a stop that was asked for, 1 where the engine failed.

    Raises:
        StartError: the engine process could not start, or the address is taken meanwhile.
    """
    with engine_process(setup) as (process, connection):
        ready = wait_until_ready(process, connection, warming)
        say(str(ready.loading))
        if ready.warm_up is not None:
            say(str(ready.warm_up))
        listen(bound)
        return asyncio.run(_Serving(ready, settings, process, connection, _address(bound, settings), say).serve(bound))


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
        self, ready: Ready, settings: Settings, process: BaseProcess, connection: Connection,
        address: str, say: Callable[[str], None],
    ):  # fmt: skip
        self._settings, self._process, self._connection, self._say = settings, process, connection, say
        tokenizer = Tokenizer.from_folder(ready.folder)
        intake = Intake(tokenizer, Limits(ready.vocab_size, ready.context, ready.eos_ids))
        self._client = Client(
            lambda message: self._channel.send(message),
            intake,
            ready.max_num_seqs,
            settings.max_waiting,
            Metrics(),
        )
        prompts = Prompts(intake, template_or_reason(ready.folder), ready.longest)
        service = Service(settings.name, self._client, prompts, int(time.time()))
        self._server = _Server(
            uvicorn.Config(
                make_app(service, settings.api_key),
                http=Protocol,
                log_level="warning",
                access_log=False,
                ssl_certfile=settings.ssl_certfile,
                ssl_keyfile=settings.ssl_keyfile,
                timeout_graceful_shutdown=_GRACE,
                server_header=False,
            ),
            listens=lambda: say(f"serving {settings.name} at {address}"),
        )
        self._code, self._over = 0, False
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, bound: socket.socket) -> int:
        self._loop = asyncio.get_running_loop()
        self._channel = Channel(
            self._connection,
            receive=lambda message: self._post(self._receive, message),
            ended=lambda: self._post(self._lost),
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._stop)
        await self._server.serve(sockets=[bound])
        self._over = True
        self._channel.send(Stop())
        self._channel.flush()
        return self._code

    # --- from the engine process

    def _post(self, call: Callable[..., None], *arguments: Any) -> None:
        """Makes a call in the loop's thread; what the engine still says after the last request, nobody needs."""
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop is closed
            if not self._over:
                raise

    def _receive(self, message: Step | Refused | Failed) -> None:
        if isinstance(message, Failed):
            self._fail(message)
        else:
            self._client.receive(message)

    def _lost(self) -> None:
        if not self._over and not self._code:
            self._process.join(_GRACE)
            self._fail(died(self._process))

    def _fail(self, failed: Failed) -> None:
        """Ends the server: without an engine there is nothing to serve."""
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


def _address(bound: socket.socket, settings: Settings) -> str:
    host, port = bound.getsockname()[:2]
    return f"{'https' if settings.ssl_certfile else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

"""An engine process without an engine, which starts at once: it brings each request a token at every tick."""

import logging
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import jaxinfer
from jaxinfer.engine import Counters, Metrics
from jaxinfer.serve.messages import Abort, Add, Loading, Ready, Setup, Step, Stop, Tokens

DEMO = Path(jaxinfer.__file__).parent / "assets" / "demo"
SLOTS, CONTEXT = 2, 1024
TICK = 0.01  # seconds
LINGERS = 4.0  # seconds


def served_by(main: str, more: str = "pass") -> str:
    """The code of a server whose replicas run a function of this file."""
    return (
        f"from jaxinfer.serve import processes, worker; from tests.serve import stub_replica; {more}; "
        f"worker.main = stub_replica.{main}; from jaxinfer.cli import app; app()"
    )


SERVED = served_by("main")


def begin(connection: Connection) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection.send(Ready(str(DEMO), 4096, CONTEXT, (0,), CONTEXT, SLOTS, 16, 64, Loading(0.0, 0.0, 0.0)))


def lingering(connection: Connection, setup: Setup, ordered: float) -> None:
    """Hangs up at the first request, but takes its time to end."""
    begin(connection)
    connection.recv()
    connection.close()
    time.sleep(LINGERS)


def say(line: str) -> None:
    """At once, between the lines of other replicas."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def loading(connection: Connection, setup: Setup, ordered: float) -> None:
    """Is never ready, and ends when it is told to."""
    say("loading")
    assert isinstance(connection.recv(), Stop)
    say("stopped")


def stuck(connection: Connection, setup: Setup, ordered: float) -> None:
    """Is never ready, and does not end when it is told to."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    say("loading")
    time.sleep(600)


def main(connection: Connection, setup: Setup, ordered: float) -> None:
    logging.getLogger("pallas_kernels").info("an op runs as a stub")
    begin(connection)
    left: dict[int, int] = {}
    while True:
        while connection.poll():
            match connection.recv():
                case Stop():
                    return
                case Abort(ids):
                    left = {name: tokens for name, tokens in left.items() if name not in ids}
                case Add(requests):
                    left |= {request.id: request.params.max_tokens for request in requests}
        left = {name: tokens - 1 for name, tokens in left.items() if tokens}
        ended = {name: None if tokens else "length" for name, tokens in left.items()}
        told = tuple(Tokens(name, (5,), (), None, reason) for name, reason in ended.items())
        connection.send(Step(told, Metrics(Counters(), 0, len(left), 64, 0, 0, 0, 0, 0)))
        time.sleep(TICK)

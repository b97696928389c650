"""The commands on several hosts: options, and a server's process that has no requests of its own."""

import multiprocessing
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from jaxinfer.serve import server
from jaxinfer.serve.messages import Failed, Following, Loading
from jaxinfer.serve.processes import EngineProcess
from tests.cli.test_cli import flat
from tests.cli.test_cli import run as invoke

FOLLOWING = Following("process 1 of 2", Loading(1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--num-processes=2"], "num_processes = 2 has no use without --coordinator"),
        (["serve", "--process-id=0"], "process_id = 0 has no use without --coordinator"),
        (["generate", "x", "--coordinator=host:1", "--num-processes=1"], "1 must be an integer, at least 2"),
        (["generate", "x", "--coordinator=host"], "coordinator = 'host' must be HOST:PORT of process 0, or auto"),
        (["generate", "x", "--coordinator=auto"], "JAX detects no cluster here"),
        (
            ["serve", "--coordinator=host:1", "--data-parallel-size=2"],
            "--data-parallel-size = 2 has no use where several processes share the model; start a group with a "
            "coordinator for each replica",
        ),
        (
            ["serve", "--coordinator=host:1", "--speculate=draft", "--online-draft"],
            "online_draft = True has no use where several processes share the model",
        ),
        (
            ["generate", "x", "--coordinator=localhost:1", "--num-processes=2", "--process-id=1", "--start-timeout=1"],
            "coordinator = localhost:1 did not answer within 1 s",
        ),
    ],
)
def test_a_group_that_cannot_be_is_refused(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in flat(result.output)


@pytest.fixture
def engine(monkeypatch):
    """What an engine process says, which tells that it follows; the server waits for it."""
    here, there = multiprocessing.Pipe()
    process = SimpleNamespace(sentinel=here, exitcode=None, join=lambda _: None, kill=lambda: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(server, "wait_until_ready", lambda engines, warming, stop: [FOLLOWING])
    monkeypatch.setattr(server, "engine_processes", lambda setups: Entered([EngineProcess(process, here)]))
    with here, there:
        yield SimpleNamespace(says=there, process=process)
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Entered:
    def __init__(self, value):
        self.value = value

    def __enter__(self):
        return self.value

    def __exit__(self, *_):
        return None


def serve(said: list[str]) -> int:
    """A server that has no socket to listen on."""
    return server.run([None], None, None, said.append, None)


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (-9, 1), (1, 1)])
def test_a_server_that_follows_ends_as_its_engine_does(engine, code, expected):
    engine.process.exitcode = code
    engine.says.close()
    assert serve(said := []) == expected
    assert said[0] == f"{FOLLOWING.loading}; process 1 of 2 follows process 0, where the server is"
    assert len(said) == 1 + expected


def test_it_says_why_the_group_ends(engine):
    engine.says.send(Failed("device", "process 0 on a is gone; the group of 2 processes ends"))
    assert serve(said := []) == 1
    assert said[-1] == "error: process 0 on a is gone; the group of 2 processes ends"


def test_the_first_signal_waits_for_process_0_and_the_second_does_not(engine):
    def press() -> None:
        for ready in (lambda: callable(signal.getsignal(signal.SIGTERM)), lambda: len(said) == 2):
            deadline = time.monotonic() + 10
            while not ready() and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

    said: list[str] = []
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # should the server not come to it
    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(SystemExit):
        serve(said)
    thread.join()
    assert said[1:] == ["stopping when process 0 does; another signal ends it now, and the group with it"]

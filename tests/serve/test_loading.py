"""Signals to a server whose engines still load."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxinfer.engine import Warmed
from jaxinfer.serve import worker
from jaxinfer.serve.channel import Channel
from jaxinfer.serve.messages import Setup, Stop, Warming
from jaxinfer.serve.processes import STOPPING
from tests.serve.stub_replica import served_by

GRACE = 0.5
DEADLINE = 20  # seconds, of which nearly all are for a busy machine
ANOTHER = "stopping: what loads has {:g} s to end; another signal ends it now\n"


@contextlib.contextmanager
def loading(main: str, replicas: int, grace: float):
    """A server of two replicas that load, and the processes of these."""
    code = served_by(main, f"processes.GRACE = {grace}")
    command = [sys.executable, "-c", code, "serve", "--port=0", f"--data-parallel-size={replicas}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "400"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert [server.stderr.readline() for _ in range(replicas)] == ["loading\n"] * replicas
            yield server
        finally:
            server.kill()


@pytest.mark.parametrize("number", STOPPING)
def test_engines_that_load_are_stopped(number):
    with loading("loading", 2, DEADLINE) as server:
        server.send_signal(number)
        assert server.wait(DEADLINE) == 0
        said = server.stderr.readlines()
    assert sorted(said) == ["stopped\n", "stopped\n", ANOTHER.format(DEADLINE)]


def test_engines_that_do_not_stop_are_ended():
    with loading("stuck", 2, GRACE) as server:
        server.terminate()
        assert server.wait(DEADLINE) == 0
        assert server.stderr.readlines() == [ANOTHER.format(GRACE)]  # to its end: nobody is left who could write


def test_a_second_signal_does_not_wait_for_them():
    with loading("stuck", 1, 10 * DEADLINE) as server:
        server.terminate()
        assert server.stderr.readline() == ANOTHER.format(10 * DEADLINE)
        server.terminate()
        assert server.wait(DEADLINE) == 0
        assert server.stderr.read() == ""


def test_an_engine_stops_after_the_program_that_it_compiles(monkeypatch):
    here, there = multiprocessing.Pipe()
    seen, warmed = [], Warmed("a program", 0.5, 1.0, 2, 1)

    def load(setup, ordered, progress, ended):
        progress(warmed, 1000)
        here.send(Stop())
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:  # until the message is through
            seen.append(warmed)
            progress(warmed, 1000)
            time.sleep(0.01)

    monkeypatch.setattr(worker, "load", load)
    # When `here` is closed it would end this process, which is no engine's.
    monkeypatch.setattr(worker, "Channel", lambda *given, ended: Channel(*given, ended=lambda: None))
    monkeypatch.setattr(signal, "signal", lambda *given: None)
    with pytest.raises(SystemExit) as caught:
        worker.main(there, Setup(None), 0.0)
    assert caught.value.code == 0
    assert here.recv() == Warming(warmed, 1000)
    assert seen

"""The engine processes of several replicas: how the server waits for them, and how it ends with them all."""

import json
import multiprocessing
import os
import signal
import struct
import time
from types import SimpleNamespace

import pytest

from jaxinfer.engine import Warmed
from jaxinfer.serve import processes
from jaxinfer.serve.messages import Failed, Loading, Ready, Warming
from jaxinfer.serve.processes import EngineProcess, StartError, wait_until_ready
from tests.serve.running import serving
from tests.serve.stub_replica import SERVED

WARMED = Warmed("64 rows of prompts", 0.5, 1.0, 2, 1)


def ready(folder: str) -> Ready:
    return Ready(folder, 10, 64, (), 64, 2, 16, 9, Loading(1.0, 2.0, 3.0))


class Replicas:
    """Two engine processes that say and end as a test wants."""

    def __init__(self):
        pipes = [multiprocessing.Pipe() for _ in range(2)]
        lives = [multiprocessing.Pipe() for _ in range(2)]
        self.says, self._lives = [there for _, there in pipes], [there for _, there in lives]
        self.processes = [SimpleNamespace(sentinel=here, exitcode=None, join=lambda _: None) for here, _ in lives]
        self.engines = [
            EngineProcess(process, here, f"replica {index}: ")
            for index, ((here, _), process) in enumerate(zip(pipes, self.processes, strict=True))
        ]

    def end(self, index: int, code: int) -> None:
        self.processes[index].exitcode = code
        self.says[index].close()
        self._lives[index].close()


@pytest.fixture
def replicas():
    return Replicas()


def test_a_signal_that_comes_just_before_python_waits_is_minded(monkeypatch):
    """Nothing wakes that wait: it has to end by itself, long before the process that it is for."""
    waits = []

    def join(seconds=None):
        waits.append(seconds)
        time.sleep(min(seconds or 0, 0.05))

    stuck = SimpleNamespace(is_alive=lambda: True, join=join, kill=lambda: waits.append("killed"))
    monkeypatch.setattr(processes, "_start", lambda setup, named: EngineProcess(stuck, None))
    monkeypatch.setattr(processes, "GRACE", 1.0)
    with processes.engine_processes([None]):
        pass
    *patient, killed, last = waits
    assert len(patient) > 3
    assert max(patient) <= processes.WAKES
    assert (killed, last) == ("killed", None)


def nothing(warming):
    raise AssertionError("nothing is compiled")


def test_all_are_waited_for_whichever_is_ready_first(replicas):
    seen = []
    for index, folder in ((1, "b"), (0, "a")):
        replicas.says[index].send(Warming(WARMED, 3))
        replicas.says[index].send(ready(folder))
    waited = wait_until_ready(replicas.engines, seen.append)
    assert [one.folder for one in waited] == ["a", "b"]
    assert seen == [Warming(WARMED, 6)] * 2


@pytest.mark.parametrize(
    ("failed", "message"),
    [
        (Failed("memory", "it does not fit", ("a card", "gpu", 7)), "replica 1: it does not fit"),
        (Failed("input", "max_num_seqs = 3 must be less"), "max_num_seqs = 3 must be less"),
    ],
)
def test_one_that_fails_is_told_while_another_still_loads(replicas, failed, message):
    replicas.says[1].send(failed)
    with pytest.raises(StartError) as caught:
        wait_until_ready(replicas.engines, nothing)
    told = caught.value.failed
    assert (told.reason, told.message, told.device) == (failed.reason, message, failed.device)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("code", "words"), [(-9, "was ended by SIGKILL; the system ends"), (3, "ended with exit code 3")]
)
def test_one_that_dies_is_told_while_another_still_loads(replicas, code, words, first):
    if first:  # it is ready
        replicas.says[0].send(ready("a"))
    replicas.end(0, code)
    with pytest.raises(StartError, match=f"replica 0: the engine process {words}"):
        wait_until_ready(replicas.engines, nothing)


def test_one_that_dies_within_a_message_is_told(replicas):
    os.write(replicas.says[1].fileno(), struct.pack("!i", 100) + b"its beginning")
    replicas.end(1, -9)
    with pytest.raises(StartError, match="replica 1: the engine process was ended by SIGKILL"):
        wait_until_ready(replicas.engines, nothing)


def test_sigterm_lets_what_runs_in_any_replica_end():
    body = {"prompt": [1, 2, 3], "max_tokens": 100, "ignore_eos": True}
    with serving(code=SERVED, data_parallel_size=2) as server:
        streams = [server.begin(body) for _ in range(2)]
        found = server.figures()
        assert [found[f'jaxinfer_running_requests{{replica="{index}"}}'] for index in range(2)] == [1, 1]
        assert len(server.engines) == 2
        server.process.send_signal(signal.SIGTERM)
        for connection, response, _ in streams:
            *_, last, done, _ = response.read().split(b"\n\n")
            assert json.loads(last.removeprefix(b"data: "))["choices"][0]["finish_reason"] == "length"
            assert done == b"data: [DONE]"
            connection.close()
        assert server.wait(20) == 0
    by_them = [line for line in server.said if "runs as" in line]
    assert sorted(by_them) == [f"replica {index}: an op runs as a stub\n" for index in range(2)]
    of_them = [line for line in server.said if line not in by_them]
    assert [line.partition(":")[0] for line in of_them[:2]] == [f"replica {index}" for index in range(2)]

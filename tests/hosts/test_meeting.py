"""How processes find each other, and what they say where they cannot: nobody waits longer than the timeout."""

import json
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress

import pytest

from jaxinfer.cli.hosts import settings
from jaxinfer.parallel import hosts
from jaxinfer.parallel.hosts import Place, find_place, meet

ODD = json.dumps({"process": "one", "host": 1, "facts": 2}).encode()


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def outcome(place: Place, timeout: float):
    """What a meeting gives, or its error."""
    try:
        wires, names, service = meet(place, timeout)
    except (ValueError, TimeoutError) as error:
        return error
    for wire in wires.values():
        wire.close()
    return sorted(wires), names, service


def meeting(places: list[Place], timeout: float = 20) -> list:
    with ThreadPoolExecutor(len(places)) as threads:
        return list(threads.map(lambda place: outcome(place, timeout), places))


def places(port: int, count: int, processes: int) -> list[Place]:
    return [Place("127.0.0.1", port, process, processes) for process in range(count)]


def test_all_meet_in_whatever_order_they_come(port):
    leader, *others = meeting(places(port, 3, 3)[::-1])[::-1]
    assert leader[0] == [1, 2]
    assert [one[0] for one in others] == [[0], [0]]
    assert len({one[2] for one in (leader, *others)}) == 1


def test_a_coordinator_that_is_not_there_is_named(port):
    start = time.monotonic()
    (error,) = meeting([Place("127.0.0.1", port, 1, 2)], 0.5)
    assert time.monotonic() - start < 5
    assert isinstance(error, TimeoutError)
    assert f"coordinator = 127.0.0.1:{port} did not answer within 0.5 s (Connection refused)" in str(error)


def test_who_does_not_come_is_named_to_all(port):
    leader, other = meeting(places(port, 2, 4), 1)
    assert isinstance(leader, TimeoutError)
    assert "of num_processes = 4 there came no process 2, 3 to process 0 at coordinator = 127.0.0.1" in str(leader)
    assert str(other) == str(leader)


def test_another_number_of_processes_is_told_to_both(port):
    leader, other = meeting([Place("127.0.0.1", port, 0, 2), Place("127.0.0.1", port, 1, 3)])
    assert f"num_processes is 2 on process 0 and 3 on process 1 on {socket.gethostname()}" == str(leader) == str(other)


def test_another_version_is_told_to_both(port, monkeypatch):
    leads = iter([True])
    real = hosts._hello

    def hello(place):
        if place.process == 0 or not next(leads, False):
            return real(place)
        return real(place) | {"facts": real(place)["facts"] | {"the version of jaxinfer": "0.0.9"}}

    monkeypatch.setattr(hosts, "_hello", hello)
    leader, other = meeting(places(port, 2, 2))
    ours = hosts.version("jaxinfer")
    named = f"process 1 on {socket.gethostname()}"
    assert f"the version of jaxinfer is {ours} on process 0 and 0.0.9 on {named}" == str(leader) == str(other)


def test_a_place_that_is_taken_is_refused_and_the_others_go_on(port):
    leader, one, other = places(port, 3, 3)
    with ThreadPoolExecutor(4) as threads:
        early = [threads.submit(outcome, place, 20) for place in (leader, one, one)]
        refused = next(as_completed(early)).result()
        assert f"process_id = 1 is that of process 1 on {socket.gethostname()}; each needs its own" in str(refused)
        late = threads.submit(outcome, other, 20)
        found = [future.result() for future in (*early, late)]
    assert sorted(one[0] for one in found if not isinstance(one, Exception)) == [[0], [0], [1, 2]]


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"",
        struct.pack(">Q", 2**63),
        struct.pack(">Q", 60_000) + b"[" * 60_000,
        struct.pack(">Q", 2) + b"{}",
        struct.pack(">Q", 8) + b"\xff" * 8,
        struct.pack(">Q", len(ODD)) + ODD,
    ],
    ids=["http", "nothing", "huge", "deep", "empty", "no-text", "odd"],
)  # fmt: skip
def test_a_stranger_does_not_keep_the_others_out(port, said):
    with ThreadPoolExecutor(2) as threads:
        leader = threads.submit(outcome, Place("127.0.0.1", port, 0, 2), 20)
        while True:
            try:
                stranger = socket.create_connection(("127.0.0.1", port))
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        with stranger:
            with suppress(OSError):  # once it is sent away
                stranger.sendall(said)
                stranger.shutdown(socket.SHUT_WR)
            other = threads.submit(outcome, Place("127.0.0.1", port, 1, 2), 20)
            assert leader.result()[0] == [1]
            assert other.result()[0] == [0]


def test_a_stranger_who_drips_has_a_deadline(port, monkeypatch):
    monkeypatch.setattr(hosts, "_HELLO", 0.3)
    with ThreadPoolExecutor(1) as threads:
        leader = threads.submit(outcome, Place("127.0.0.1", port, 0, 2), 1.0)
        time.sleep(0.2)
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            start = time.monotonic()
            with suppress(OSError):  # when it is sent away
                while time.monotonic() - start < 10:
                    stranger.sendall(b"\0")
                    time.sleep(0.05)
            assert time.monotonic() - start < 5
        assert isinstance(leader.result(), TimeoutError)


def test_a_port_that_is_taken_is_named(port):
    with socket.create_server(("127.0.0.1", port)):
        (error,) = meeting([Place("127.0.0.1", port, 0, 2)])
    assert f"coordinator = 127.0.0.1:{port}: process 0 cannot listen there: Address already in use" in str(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host", 2, 0, 9), "coordinator = 'host' must be HOST:PORT of process 0, or auto"),
        (("host:0", 2, 0, 9), "coordinator = 'host:0' must be HOST:PORT"),
        ((":80", 2, 0, 9), "coordinator = ':80' must be HOST:PORT"),
        (("host:80", 1, 0, 9), "num_processes = 1 must be an integer, at least 2"),
        (("host:80", None, 0, 9), "num_processes = None must be an integer, at least 2"),
        (("host:80", 2, 2, 9), "process_id = 2 must be an integer in 0..1"),
        (("host:80", 2, None, 9), "process_id = None must be an integer in 0..1"),
        (("host:80", 2, 1, 0), "timeout = 0 must be seconds above 0"),
        (("auto", None, None, 9), "coordinator = 'auto': JAX detects no cluster here; give coordinator, num_proc"),
    ],
)
def test_a_wrong_place_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        find_place(*arguments)


def test_an_address_of_ipv6_has_brackets():
    place = find_place("[::1]:80", 2, 1, 9)
    assert (place.host, place.port, place.address) == ("::1", 80, "[::1]:80")


SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2",
}  # fmt: skip


def test_a_task_of_srun_finds_its_place(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    place = find_place("auto", None, None, 9)
    assert (place.host, place.process, place.processes) == ("node03", 1, 2)
    assert settings({"coordinator": None}, SLURM) == {"coordinator": "auto", "timeout": 300}


@pytest.mark.parametrize("changes", [{"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_PROCID": None}])
def test_who_is_alone_is_no_group(changes):
    environment = {name: value for name, value in (SLURM | changes).items() if value is not None}
    assert settings({"coordinator": None, "process_id": None}, environment) is None

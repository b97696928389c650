"""What the processes of a group say to each other, and that each knows when another has ended."""

import pickle
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import pytest

from jaxinfer.parallel import Group, group
from jaxinfer.parallel.wire import Wire, WireError

TOKEN = b"a secret of this group"


@pytest.fixture
def pair():
    """Makes two sockets that are connected, and closes them."""
    with ExitStack() as opened:

        def make() -> tuple[socket.socket, socket.socket]:
            with socket.create_server(("127.0.0.1", 0)) as server:
                there = opened.enter_context(socket.create_connection(server.getsockname()))
                return opened.enter_context(server.accept()[0]), there

        yield make


@pytest.fixture
def wires(pair):
    """Makes both ends of a connection, the second with its own idea of the token."""

    def make(token: bytes = TOKEN) -> tuple[Wire, Wire]:
        here, there = (Wire(one) for one in pair())
        here.secure(TOKEN, "to 1", "from 1")
        there.secure(token, "from 1", "to 1")
        for wire in (here, there):
            wire.patience(10)
        return here, there

    return make


class Ends:
    """Two groups of this process, as if they were two processes; `told` is why each ended."""

    def __init__(self, here: Wire, there: Wire, start: float = 10):
        self.leader, self.other = Group(0, 2, {1: here}, {1: "b"}, start), Group(1, 2, {0: there}, {0: "a"}, start)
        self.told: dict[int, list[str]] = {0: [], 1: []}
        self.leader.ended, self.other.ended = self.told[0].append, self.told[1].append

    def wait_for(self, process: int) -> str:
        deadline = time.monotonic() + 10
        while not self.told[process]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (told,) = self.told[process]
        return told

    def close(self) -> None:
        for one in (self.leader, self.other):
            one._begin_end()
            one.leave()


@pytest.fixture
def made(wires):
    """Makes `Ends`."""
    with ExitStack() as opened:
        yield lambda start=10.0: opened.enter_context(closing(Ends(*wires(), start)))


@pytest.fixture
def ends(made):
    return made()


class Trap:
    """Must never be unpickled."""

    def __reduce__(self):
        return pytest.fail, ("a stranger's pickle was opened",)


@pytest.mark.parametrize("token", [TOKEN, b"another"])
def test_a_frame_counts_only_with_the_code_of_the_group(wires, token):
    here, there = wires(token)
    there.send(("call", list(range(1000))) if token == TOKEN else Trap())
    if token == TOKEN:
        assert here.receive() == ("call", list(range(1000)))
    else:
        with pytest.raises(WireError, match="sent a frame without the code of this group"):
            here.receive()


def test_a_frame_that_is_sent_twice_or_back_does_not_count(pair):
    raw, there = pair()
    here, sender = Wire(there), Wire(raw)
    here.patience(10)
    sender.secure(TOKEN, "from 1", "to 1")
    content = pickle.dumps("once", protocol=5)
    assert sender._keys is not None
    frame = sender._code(sender._keys[0], 0, content) + content
    back = sender._code(sender._keys[1], 1, content) + content
    here.secure(TOKEN, "to 1", "from 1")
    for one in (frame, frame, back):
        raw.sendall(struct.pack(">Q", len(one)) + one)
    assert here.receive() == "once"
    for _ in range(2):
        with pytest.raises(WireError, match="without the code"):
            here.receive()


def test_a_frame_too_large_is_refused_before_it_is_read(wires):
    here, there = wires()
    there._socket.sendall(struct.pack(">Q", 2**40))
    with pytest.raises(WireError, match=f"sent a frame of {2**40} bytes; at most"):
        here.receive()


def test_calls_come_in_their_order_until_the_end(ends):
    for index in range(100):
        ends.leader.call("loop", index)
    with ThreadPoolExecutor(1) as threads:
        left = threads.submit(ends.leader.leave)
        assert [ends.other.next_call() for _ in range(101)] == [*(("loop", index) for index in range(100)), None]
        ends.other.leave()
        left.result()
    assert ends.told == {0: [], 1: []}


def test_who_has_nothing_left_to_do_waits_for_the_leader(ends):
    with ThreadPoolExecutor(2) as threads:
        left = threads.submit(ends.other.leave)
        time.sleep(0.1)
        assert not left.done()
        ends.leader.leave()
        left.result()
    assert ends.told == {0: [], 1: []}


def test_who_leaves_before_it_has_run_all_is_missed(ends):
    ends.leader.call("loop")
    ends.other.leave()
    assert ends.wait_for(0) == "process 1 on b is gone; the group of 2 processes ends"


@pytest.mark.parametrize("facts", [{"max_num_seqs": "8"}, {}, {"max_num_seqs": "4", "dtype": "bfloat16"}])
def test_what_differs_is_named_with_both_values(ends, facts):
    ours = {"max_num_seqs": "4"}
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(ends.other.agree, facts)
        with pytest.raises(ValueError, match="on process 0 and") as raised:
            ends.leader.agree(ours)
        assert str(other.exception()) == str(raised.value)
    ends.other.leave(str(raised.value))  # whoever is first to go, the other has its own words
    assert ends.told == {0: [], 1: []}
    (name,) = [name for name in {**ours, **facts} if ours.get(name) != facts.get(name)]
    said = f"{name} is {ours.get(name, 'absent')} on process 0 and {facts.get(name, 'absent')} on process 1 on b"
    assert str(raised.value) == said


def test_what_is_the_same_is_agreed(ends):
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(ends.other.agree, {"a": "1"})
        ends.leader.agree({"a": "1"})
        assert other.result() is None


def test_who_does_not_tell_its_options_is_waited_for_no_longer_than_the_timeout(made):
    with pytest.raises(TimeoutError, match=r"process 1 on b has not told its options within 0\.2 s"):
        made(0.2).leader.agree({})


@pytest.mark.parametrize("dies", [0, 1])
def test_who_is_gone_ends_the_others(ends, dies):
    (ends.leader, ends.other)[dies]._wires[1 - dies]._socket.shutdown(socket.SHUT_RDWR)
    name = ("process 0 on a", "process 1 on b")[dies]
    assert ends.wait_for(1 - dies) == f"{name} is gone; the group of 2 processes ends"


def test_who_fails_says_why(ends):
    with pytest.raises(RuntimeError), ends.other:
        raise RuntimeError("no memory\nfor it")
    assert ends.wait_for(0) == "process 1 failed: no memory; the group of 2 processes ends"


def test_who_is_silent_ends_the_others(made, monkeypatch):
    monkeypatch.setattr(group, "SILENCE", 0.5)
    monkeypatch.setattr(group, "BEATS", 60)
    silent = made().wait_for(0).removesuffix(" is silent; the group of 2 processes ends")
    assert silent in ("process 1 on b", "process 0 on a")  # whoever is the first to find it of the other


def test_who_has_nothing_to_say_is_not_silent(made, monkeypatch):
    monkeypatch.setattr(group, "SILENCE", 1.0)
    monkeypatch.setattr(group, "BEATS", 0.1)
    ends = made()
    time.sleep(2)
    assert ends.told == {0: [], 1: []}
    threading.Thread(target=ends.other.leave, args=("enough",)).start()
    assert "enough" in ends.wait_for(0)

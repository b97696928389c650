"""What one end of the pipe learns of the other's death."""

import multiprocessing
import os
import struct
import threading

import pytest

from jaxinfer.serve.channel import Channel


@pytest.mark.parametrize("within", [False, True])
def test_a_death_is_told_also_within_a_message(within):
    here, there = multiprocessing.Pipe()
    received, ended = [], threading.Event()
    Channel(here, received.append, ended.set)
    there.send("whole")
    if within:
        os.write(there.fileno(), struct.pack("!i", 100) + b"its beginning")
    there.close()
    assert ended.wait(20)
    assert received == ["whole"]

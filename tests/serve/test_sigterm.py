"""The last test of the server that several modules share: nothing is served after it (`tests/conftest.py`)."""

import signal
import threading
import time

import openai
import pytest

from tests.serve.running import LONG


def test_sigterm_ends_what_runs_and_refuses_the_new(server, client):
    pieces = []
    options = {"model": "demo", "prompt": "a", "stream": True, **LONG, "max_tokens": 100}

    def read():
        pieces.extend(client.completions.create(**options))

    reader = threading.Thread(target=read)
    reader.start()
    server.wait_for(running_requests=1)
    server.process.send_signal(signal.SIGTERM)
    while (answer := server.ask("GET", "/health"))[0] == 200:
        time.sleep(0.01)
    assert answer[0] == 503
    with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
        client.completions.create(model="demo", prompt="a")
    assert caught.value.status_code == 503
    reader.join()
    assert pieces[-1].choices[0].finish_reason == "length"
    assert server.wait(20) == 0
    assert not any("Traceback" in line for line in server.said)

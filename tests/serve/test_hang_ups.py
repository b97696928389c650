"""Whoever hangs up makes room for the others."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import openai
import pytest

from tests.serve.running import COMPLETION, LONG

ABORTED = 'jaxinfer_requests_total{reason="abort"}'


@contextmanager
def aborted(server, running: int) -> Iterator[None]:
    """So many requests run, and what happens inside ends all of them."""
    server.wait_for(running_requests=running)
    before = server.figures().get(ABORTED, 0)
    yield
    server.wait_for(running_requests=0, cache_pages_used=0)
    assert server.figures()[ABORTED] == before + running


def test_a_stream_that_nobody_reads_is_aborted(server, client):
    stream = client.completions.create(model="demo", prompt="def f():", stream=True, **LONG)
    next(iter(stream))
    with aborted(server, 1):
        stream.close()


def test_a_request_whose_caller_hangs_up_is_aborted(server):
    body = json.dumps({"prompt": "a", "max_tokens": 900, "temperature": 0, "ignore_eos": True, "n": 2})
    connection = server.connect()
    connection.request("POST", COMPLETION, body, {"Content-Type": "application/json"})
    with aborted(server, 2):
        connection.close()


def test_a_caller_who_hangs_up_within_the_body_is_no_error(server):
    """The last test sees that the log has nothing of it."""
    connection = server.connect()
    connection.putrequest("POST", COMPLETION)
    for name, value in (("Content-Type", "application/json"), ("Content-Length", "1000")):
        connection.putheader(name, value)
    connection.endheaders(b'{"prompt": ')
    connection.close()
    assert server.ask("GET", "/health")[0] == 200


def test_a_full_queue_says_when_to_come_again(server, client):
    """Four run and four wait; then those that wait hang up, and there is room again."""
    stream = client.completions.create(model="demo", prompt="a", stream=True, n=4, **LONG)
    for _ in range(2):
        waiting = server.connect()
        body = json.dumps({"prompt": "a", "n": 4})
        waiting.request("POST", COMPLETION, body, {"Content-Type": "application/json"})
        server.wait_for(running_requests=4, waiting_requests=4)
        status, headers, answer = server.ask("POST", COMPLETION, {"prompt": "a"})
        assert status == 429
        assert 1 <= int(headers["retry-after"]) <= 60
        assert json.loads(answer)["error"]["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError, match="the queue is full: 8 requests run or wait, at most 8 may"):
            client.completions.create(model="demo", prompt="a", n=2)
        waiting.close()
        server.wait_for(running_requests=4, waiting_requests=0)
    stream.close()
    server.wait_for(running_requests=0, waiting_requests=0, cache_pages_used=0)

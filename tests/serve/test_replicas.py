"""A server of two replicas, beside that of one: the last test ends it."""

import os
import signal
import time

import pytest

from tests.serve.running import COMPLETION, serving

PAGE = 16  # tokens
BEGINNINGS = [range(first, first + 2 * PAGE) for first in (100, 200)]


@pytest.fixture(scope="module")
def replicas(folder):
    with serving(str(folder), served_model_name="demo", data_parallel_size=2) as running:
        yield running


def by_replica(server, name: str) -> list[float]:
    found = server.figures()
    return [found[f'jaxinfer_{name}{{replica="{index}"}}'] for index in range(2)]


def test_answers_are_those_of_one_replica_and_both_give_them(server, replicas):
    prompts = [[*range(first, first + 40)] for first in (300, 700)]
    body = {"prompt": prompts, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    answers = [one.post(COMPLETION, body)[1]["choices"] for one in (server, replicas)]
    assert answers[0] == answers[1]
    assert len({choice["text"] for choice in answers[1]}) > 1
    assert by_replica(replicas, "prefix_queried_tokens_total") == [40, 40]
    assert replicas.ask("GET", "/health")[0] == 200


def test_prompts_that_begin_alike_meet_their_pages(replicas):
    """Of two beginnings, which come by turns, each has a replica."""

    def ask(*own: int) -> None:
        for beginning in BEGINNINGS:
            body = {"prompt": [*beginning, *own], "max_tokens": 2, "temperature": 0}
            assert replicas.post(COMPLETION, body)[0] == 200

    ask(*range(8))
    before = by_replica(replicas, "prefix_found_tokens_total")
    for own in range(3):
        ask(*[own] * 8)
    replicas.wait_for(running_requests=0)
    after = by_replica(replicas, "prefix_found_tokens_total")
    assert [now - then for now, then in zip(after, before, strict=True)] == [3 * 2 * PAGE] * 2


def test_the_death_of_one_ends_the_server(replicas):
    _, second = replicas.engines
    body = {"max_tokens": 900, "temperature": 0, "ignore_eos": True}
    streams = [replicas.begin(body | {"prompt": [first] * 40}) for first in (5, 6)]
    assert by_replica(replicas, "running_requests") == [1, 1]
    killed = time.monotonic()
    os.kill(second, signal.SIGKILL)
    for connection, response, _ in streams:
        *_, error, done, _ = response.read().split(b"\n\n")
        assert b"the engine failed while the request ran" in error
        assert done == b"data: [DONE]"
        connection.close()
    assert replicas.wait(30) == 1
    assert time.monotonic() - killed < 20
    assert "error: replica 1: the engine process was ended by SIGKILL" in "".join(replicas.said)

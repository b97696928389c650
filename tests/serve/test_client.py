"""The HTTP process's side of the engine, told by hand what the engine brings."""

import asyncio
from dataclasses import replace

import pytest

from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Counters, Metrics
from jaxinfer.intake import Intake, Limits
from jaxinfer.llm import DEMO
from jaxinfer.serve import metrics
from jaxinfer.serve.client import Client
from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.messages import Abort, Add, Refused, Step, Tokens
from jaxinfer.serve.router import Replica, Router
from jaxinfer.text import Tokenizer

INTAKE = Intake(Tokenizer.from_folder(DEMO), Limits(4096, 1024, (0,)))
IDLE = Metrics(Counters(), 0, 0, 9, 0, 0, 0, 0, 0)
PARAMS = SamplingParams(max_tokens=4)


def made(replicas=1):
    """A client of replicas with two slots each, what it sends, and to which."""
    sent, to, router = [], [], Router([Replica(slots=2, pages=8) for _ in range(replicas)], page_size=4)

    def send(replica, message):
        sent.append(message)
        to.append(replica)

    client = Client(send, INTAKE, router, max_waiting=1, metrics=metrics.Metrics())
    return (client, sent) if replicas == 1 else (client, sent, to)


def step(*tokens):
    return Step(tokens, IDLE)


@pytest.mark.parametrize(
    ("reason", "status", "words"),
    [("timeout", 503, "try again"), ("abort", 500, "try again"), ("error", 500, "failed in the engine")],
)
def test_what_the_engine_gave_up_is_an_error(reason, status, words):
    async def ask():
        client, sent = made()
        given_up, other = client.start([[1]], PARAMS), client.start([[2]], PARAMS, priority=-1, arrived=5.0)
        assert [request.priority for message in sent for request in message.requests] == [0, -1]
        assert sent[1].requests[0].arrived == other.started == 5.0
        client.receive(step(Tokens(0, (), (), None, reason), Tokens(1, (5, 6, 7, 8), (), None, "length")))
        with pytest.raises(ApiError, match=words) as caught:
            await given_up.outputs()
        (output,) = await other.outputs()
        assert (caught.value.status, output.token_ids) == (status, [5, 6, 7, 8])
        counted = client.metrics.registry.get_sample_value
        assert counted("jaxinfer_requests_total", {"reason": reason}) == 1
        assert [type(message) for message in sent] == [Add, Add]  # what has ended is not aborted
        other.close()
        assert client.idle

    asyncio.run(ask())


@pytest.mark.parametrize("field", ["structured_outputs", "response_format"])
def test_a_structure_that_cannot_go_on_is_the_callers(field):
    """By the field that the caller gave."""

    async def ask():
        client, _ = made()
        spelled = {} if field == "structured_outputs" else {"structured_outputs": field}
        group = client.start([[1]], PARAMS, spelled=spelled)
        problem = "structured_outputs has a regex that cannot be used: it is too large"
        client.receive(step(Tokens(0, (0,), (), None, "constraint", problem=problem)))
        with pytest.raises(ApiError) as caught:
            await group.outputs()
        assert (caught.value.status, caught.value.param) == (400, field)
        assert caught.value.message == f"{field} has a regex that cannot be used: it is too large"
        assert client.idle

    asyncio.run(ask())


def test_a_text_that_cannot_be_made_ends_no_other(monkeypatch, caplog):
    async def ask():
        client, sent = made()
        broken, other = client.start([[1]], SamplingParams(max_tokens=4, n=2)), client.start([[2]], PARAMS)
        monkeypatch.setattr(broken.continuations[1], "decoder", None)
        client.receive(step(*(Tokens(name, (5,), (), None, None) for name in range(3))))
        with pytest.raises(ApiError, match="the text of this request cannot be made") as caught:
            await broken.outputs()
        assert (caught.value.status, sent[-1]) == (500, Abort((0, 1)))
        client.receive(step(Tokens(0, (6,), (), None, "length"), Tokens(2, (6,), (), None, "length")))
        (output,) = await other.outputs()
        assert output.token_ids == [5, 6]

    asyncio.run(ask())
    assert [record.message for record in caplog.records] == ["the text of request 1 cannot be made"]


def test_a_request_that_the_engine_refuses():
    async def ask():
        client, _ = made()
        group = client.start([[1]], PARAMS)
        client.receive(Refused(0, "max_tokens = 4 must be less"))
        with pytest.raises(ApiError, match="must be less") as caught:
            await anext(group.pieces())
        assert (caught.value.status, caught.value.param) == (400, "max_tokens")
        assert client.idle

    asyncio.run(ask())


def test_a_slow_reader_gets_longer_pieces_and_a_stop_string_aborts():
    async def ask():
        client, sent = made()
        ids = INTAKE.tokenizer.encode("for i in range", add_special_tokens=False)
        group = client.start([[1]], SamplingParams(max_tokens=99, stop="range"))
        for token in ids[:-1]:
            client.receive(step(Tokens(0, (token,), (), None, None)))
        pieces = group.pieces()
        assert (await anext(pieces)).text == "for i in"
        client.receive(step(Tokens(0, (ids[-1],), (), None, None)))
        rest = [piece async for piece in pieces]
        assert [(piece.text, piece.finish_reason, piece.stop_reason) for piece in rest] == [(" ", "stop", "range")]
        assert [type(message) for message in sent] == [Add, Abort]

    asyncio.run(ask())


def test_continuations_stay_together_and_aborts_follow_them():
    async def ask():
        client, sent, to = made(replicas=2)
        both = client.start([[1, 2], [3, 4]], SamplingParams(max_tokens=4, n=2))
        assert [[request.prompt_ids for request in message.requests] for message in sent] == [
            [(1, 2)] * 2,
            [(3, 4)] * 2,
        ]
        assert [one.index for one in both.continuations] == [0, 1, 2, 3]
        first, second = to
        client.receive(step(Tokens(0, (5, 6, 7, 8), (), None, "length")), first)
        waits = client.start([[9]], PARAMS)  # where a slot is free
        assert to[-1] == first != second
        client.drop(both)
        assert sent[-2:] == [Abort((1,)), Abort((2, 3))]
        assert to[-2:] == [first, second]
        client.receive(Refused(4, "no"), first)
        with pytest.raises(ApiError, match="no"):
            await waits.outputs()
        replicas = client._router.replicas
        assert client.idle
        assert [(one.tokens, one.sequences) for one in replicas] == [(0, 0), (0, 0)]
        assert len(replicas[first].known) == 1  # the page of what came of a prompt

    asyncio.run(ask())


def test_the_queue_has_room_for_what_all_replicas_run():
    client, _, to = made(replicas=3)
    for _ in range(7):
        client.start([[1]], PARAMS)
    assert sorted(to[:6]) == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ApiError, match="7 requests run or wait, at most 7 may"):
        client.start([[1]], PARAMS)


def test_figures_of_the_engine_are_told_by_replica():
    client, _, _ = made(replicas=2)
    for replica, running in ((1, 4), (0, 3)):
        client.receive(Step((), replace(IDLE, running=running)), replica)
    found = client.metrics.registry.get_sample_value
    assert [found("jaxinfer_running_requests", {"replica": replica}) for replica in ("0", "1")] == [3, 4]

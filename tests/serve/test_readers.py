"""A body on its way to the engine: it waits for no slower one, and has a place in the queue before it is tokenized."""

import asyncio
import json
import threading

import pytest

from jaxinfer.intake import Intake, Limits
from jaxinfer.llm import DEMO
from jaxinfer.serve.app import Service, make_app
from jaxinfer.serve.client import Client
from jaxinfer.serve.metrics import Metrics
from jaxinfer.serve.prompts import Prompts
from jaxinfer.serve.readers import LONG
from jaxinfer.serve.router import Replica, Router
from jaxinfer.text import Tokenizer
from tests.serve.running import COMPLETION

TEXT = "a" * (LONG + 1)
STRUCTURED = {"prompt": "a", "structured_outputs": {"regex": "[ab]"}}
MANY = 40  # more than the loop has threads


@pytest.fixture
def service():
    """Of a model with room for all of these texts, and a queue for `MANY` requests."""
    intake = Intake(Tokenizer.from_folder(DEMO), Limits(4096, 1 << 20, (0,)))
    router = Router([Replica(MANY // 2, 0)], page_size=16)
    client = Client(lambda replica, message: None, intake, router, MANY // 2, Metrics())
    return Service("demo", client, Prompts(intake, "no template", 1 << 20), 0)


@pytest.fixture
def held(monkeypatch):
    """Long texts and grammars, which wait until this is set; `begun` has those that a thread has taken."""
    held, encode = threading.Event(), Tokenizer.encode
    held.begun = []

    def slow(self, text, **options):
        if len(text) > LONG:
            hold("text")
        return encode(self, text, **options)

    def hold(*what):
        held.begun.append(what)
        assert held.wait(60)

    monkeypatch.setattr(Tokenizer, "encode", slow)
    monkeypatch.setattr("jaxinfer.structured.Grammars.problem", hold)
    yield held
    held.set()


async def ask(app, path, body, gone=None) -> tuple[int, dict]:
    """Status and answer to a caller who hangs up when `gone` is set."""
    messages, told = [{"type": "http.request", "body": json.dumps(body).encode()}], []

    async def receive():
        if messages:
            return messages.pop()
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message):
        told.append(message)

    headers = [(b"content-type", b"application/json")]
    await app({"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}, receive, send)
    return told[0]["status"], json.loads(told[1]["body"] or "{}")


async def begin(held, *asked):
    """Lets requests run until one is held at least, and no more are for a while."""
    tasks, before = [asyncio.create_task(one) for one in asked], 0
    async with asyncio.timeout(20):
        while not before or len(held.begun) > before:
            before = len(held.begun)
            await asyncio.sleep(0.2)
    assert not any(task.done() for task in tasks)
    return tasks


@pytest.mark.parametrize(
    ("path", "slow"), [("/tokenize", {"prompt": TEXT}), (COMPLETION, {"prompt": TEXT}), (COMPLETION, STRUCTURED)]
)
def test_a_short_text_waits_for_no_long_ones_and_for_no_grammars(service, held, path, slow):
    async def run():
        app = make_app(service)
        tasks = await begin(held, *(ask(app, path, slow) for _ in range(MANY)))
        assert 2 <= len(held.begun) < MANY / 2
        async with asyncio.timeout(20):
            status, answer = await ask(app, "/tokenize", {"prompt": "a b"})
        assert (status, answer["count"]) == (200, len(service.prompts.intake.tokens("a b")))
        assert not held.is_set()
        for task in tasks:
            task.cancel()
        held.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


def test_who_finds_the_queue_full_is_told_so_before_any_text_is_tokenized(service, held):
    """Also by those whose texts are being tokenized, until they hang up."""

    async def run():
        app, gone = make_app(service), asyncio.Event()
        tasks = await begin(held, ask(app, COMPLETION, {"prompt": [TEXT, "a"], "n": MANY // 2}, gone))
        begun = list(held.begun)
        async with asyncio.timeout(20):
            for prompt in ("a", TEXT):
                status, answer = await ask(app, COMPLETION, {"prompt": prompt})
                assert (status, answer["error"]["code"]) == (429, "queue_full")
        gone.set()
        assert await asyncio.gather(*tasks) == [(499, {})]
        assert held.begun == begun
        with service.client.places(MANY):
            service.client.close(503, "the server is shutting down")
        status, answer = await ask(app, COMPLETION, {"prompt": TEXT})
        assert (status, held.begun) == (503, begun)
        held.set()

    asyncio.run(run())

"""A server under everything at once: random arrivals and lengths, callers that hang up, and more than it can take."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from benchmarks.record import Record
from benchmarks.serving.online import events
from benchmarks.serving.server import QUIET, Server

OPTIONS = ("--max-num-seqs=8", "--max-num-batched-tokens=128", "--max-waiting=16", "--max-model-len=256")
LONGEST_PROMPT, MOST_TOKENS = 120, 64
VOCABULARY = 1000  # prompts are token ids below it; every model has more
COMPILED = "jaxinfer_compiled_programs_total"
FLAT = 1.05  # of the memory after a tenth of the requests, at most at the end


@dataclass(frozen=True)
class Visit:
    """What one caller does.

    Attributes:
        after: seconds since the one before came.
        prompt, output: tokens in, and tokens asked for.
        streamed: whether the answer is to come in pieces.
        patience: seconds until the caller hangs up; None waits for the end.
    """

    after: float
    prompt: tuple[int, ...]
    output: int
    streamed: bool
    patience: float | None


def visits(count: int, rate: float, seed: int = 0) -> Iterator[Visit]:
    """Callers at random, `rate` a second in the mean; one in five hangs up."""
    rng = random.Random(seed)
    for _ in range(count):
        yield Visit(
            after=rng.expovariate(rate),
            prompt=tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, LONGEST_PROMPT))),
            output=rng.randint(1, MOST_TOKENS),
            streamed=rng.random() < 0.5,
            patience=rng.expovariate(2.0) if rng.random() < 0.2 else None,
        )


def soak(server: Server, count: int, rate: float) -> list[Record]:
    """Sends the callers, and holds the server to what it owes them.

    Raises:
        RuntimeError: an answer was wrong, a request was lost, or pages were; the server compiled, or its memory grew.
    """
    early = asyncio.run(crowd(server.url, visits(count // 10, rate)))
    server.settle()
    memory_early, before = server.memory(), server.figures()
    late = asyncio.run(crowd(server.url, visits(count - count // 10, rate, seed=1)))
    after = server.settle()
    outcomes = early + late
    if wrong := {name: number for name, number in outcomes.items() if name not in ("whole", "hung up", "refused")}:
        raise RuntimeError(f"of {count} requests some went wrong: {wrong}")
    if outcomes.total() != count:
        raise RuntimeError(f"of {count} requests {outcomes.total()} are accounted for")
    if after["jaxinfer_cache_pages_used"]:
        raise RuntimeError(f"{after['jaxinfer_cache_pages_used']:g} pages are lost")
    if compiled := after[COMPILED] - before[COMPILED]:
        raise RuntimeError(f"{compiled:g} programs were compiled meanwhile")
    if (memory := server.memory()) > FLAT * memory_early:
        raise RuntimeError(f"memory grew from {memory_early / 1e6:.0f} to {memory / 1e6:.0f} MB")
    figures = {f"requests {name}": (number, "requests") for name, number in outcomes.items()} | {
        "pages lost": (after["jaxinfer_cache_pages_used"], "pages"),
        "memory after a tenth": (memory_early / 1e6, "MB"),
        "memory at the end": (memory / 1e6, "MB"),
        "programs compiled meanwhile": (compiled, "programs"),
    }
    return [Record(f"soak of {count}", "jaxinfer", name, value, unit) for name, (value, unit) in figures.items()]


async def crowd(url: str, callers: Iterator[Visit]) -> Counter[str]:
    """How many callers got what: `whole`, `hung up`, `refused` because the server was full, or what went wrong."""
    tasks = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
    async with httpx.AsyncClient(base_url=url, timeout=QUIET, limits=limits) as client:
        for visit in callers:
            await asyncio.sleep(visit.after)
            tasks.append(asyncio.create_task(_call(client, visit)))
        return Counter(await asyncio.gather(*tasks))


async def _call(client: httpx.AsyncClient, visit: Visit) -> str:
    body = {
        "prompt": list(visit.prompt), "max_tokens": visit.output, "ignore_eos": True, "temperature": 0.5,
        "stream": visit.streamed,
    }  # fmt: skip
    if visit.streamed:
        body["stream_options"] = {"include_usage": True}
    try:
        async with asyncio.timeout(visit.patience):
            return await _outcome(client, body, visit)
    except TimeoutError:
        return "hung up"
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {error}"


async def _outcome(client: httpx.AsyncClient, body: dict, visit: Visit) -> str:
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
            return "refused" if "retry-after" in response.headers else "refused without a time to come again"
        if response.status_code != httpx.codes.OK:
            return f"status {response.status_code}"
        if visit.streamed:
            pieces = [piece async for piece in events(response)]
            answer = pieces[-1] if pieces else {}
        else:
            answer = json.loads(await response.aread())
    used = answer.get("usage") or {}
    right = (used.get("prompt_tokens"), used.get("completion_tokens")) == (len(visit.prompt), visit.output)
    return "whole" if right else f"an answer with the usage {used}"

"""Requests that arrive over time, at any server that speaks OpenAI's protocol: when did each of their tokens come?"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import httpx

from benchmarks.serving.workload import Job

SECONDS = 600.0  # that a server may be silent


@dataclass
class Timeline:
    """When things happened to one request, in seconds of one clock.

    Attributes:
        sent: when it was.
        pieces: when each piece of the answer came.
        tokens: in the answer, as the server counts them.
        error: why there is no whole answer; None where there is.
    """

    sent: float
    pieces: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None

    @property
    def first_token(self) -> float:
        """Seconds from the request to the first piece."""
        return self.pieces[0] - self.sent

    @property
    def per_token(self) -> float:
        """Seconds a token takes after the first piece, in the mean over the answer."""
        return (self.pieces[-1] - self.pieces[0]) / max(1, self.tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between one piece and the next."""
        return [after - before for before, after in itertools.pairwise(self.pieces)]

    @property
    def whole(self) -> float:
        """Seconds from the request to the last piece."""
        return self.pieces[-1] - self.sent


@dataclass(frozen=True)
class Target:
    """The server.

    Attributes:
        url: up to and with `/v1`.
        model: the name that it serves.
        key: of its API; None sends none.
    """

    url: str
    model: str
    key: str | None = None


async def arrive(target: Target, jobs: Sequence[Job], rate: float, seed: int = 0) -> list[Timeline]:
    """Sends the jobs in their order, `rate` a second in the mean and independently of each other (a Poisson process),
    whatever has been answered; a rate of infinity sends all at once.

    Returns:
        a timeline per job. One that fails says so, and ends nothing else.
    """
    rng = random.Random(seed)
    headers = {} if target.key is None else {"Authorization": f"Bearer {target.key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(headers=headers, timeout=SECONDS, limits=limits) as client:
        tasks, due = [], time.perf_counter()
        for job in jobs:
            await asyncio.sleep(due - time.perf_counter())
            tasks.append(asyncio.create_task(ask(client, target, job)))
            due += 0.0 if rate == float("inf") else rng.expovariate(rate)
        return await asyncio.gather(*tasks)


async def ask(client: httpx.AsyncClient, target: Target, job: Job) -> Timeline:
    """One streamed completion."""
    timeline = Timeline(time.perf_counter())
    body = {
        "model": target.model, "prompt": list(job.prompt), "max_tokens": job.output, "temperature": 0.0,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    try:
        async with client.stream("POST", f"{target.url}/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                timeline.error = f"{response.status_code}: {response.text[:200]}"
                return timeline
            async for event in events(response):
                _note(timeline, event)
    except httpx.HTTPError as error:
        timeline.error = f"{type(error).__name__}: {error}"
    if timeline.error is None and timeline.tokens != job.output:
        timeline.error = f"{timeline.tokens} tokens came where {job.output} were asked for"
    return timeline


async def events(response: httpx.Response) -> AsyncIterator[dict]:
    """The objects of a stream of server-sent events, up to its end mark."""
    async for line in response.aiter_lines():
        kind, _, data = line.partition(": ")
        if kind == "data" and data != "[DONE]":
            yield json.loads(data)


def _note(timeline: Timeline, event: dict) -> None:
    if "error" in event:
        timeline.error = str(event["error"])
    if event.get("choices"):
        timeline.pieces.append(time.perf_counter())
    if usage := event.get("usage"):
        timeline.tokens = usage["completion_tokens"]

"""A server under everything at once: random arrivals and lengths, callers that hang up, and more than it can take."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.record import Record
from benchmarks.serving.online import events

OPTIONS = ("--max-num-seqs=8", "--max-num-batched-tokens=128", "--max-waiting=16", "--max-model-len=256", "--port=0")
LONGEST_PROMPT, MOST_TOKENS = 120, 64
VOCABULARY = 1000  # prompts are token ids below it; every model has more
COMPILED = "jaxinfer_compiled_programs_total"
FLAT = 1.05  # of the memory after a tenth of the requests, at most at the end
QUIET = 60.0  # seconds that a server has to settle


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


@dataclass(frozen=True)
class Server:
    """A `jaxinfer serve` of the demo model in a process of its own."""

    process: subprocess.Popen
    url: str

    def figures(self) -> dict[str, float]:
        """The figures of `/metrics` by name, sums over their labels."""
        totals: dict[str, float] = {}
        for line in httpx.get(f"{self.url}/metrics").raise_for_status().text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    def memory(self) -> int:
        """Resident bytes of the HTTP process and the engine's."""
        pids = [self.process.pid, *_children(self.process.pid)]
        return sum(_resident(pid) for pid in pids)

    def settle(self) -> dict[str, float]:
        """The figures when nothing runs or waits any more.

        Raises:
            TimeoutError: something still does, after a minute.
        """
        deadline = time.monotonic() + QUIET
        while (found := self.figures())["jaxinfer_running_requests"] or found["jaxinfer_waiting_requests"]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server does not settle: {found}")
            time.sleep(0.1)
        return found


@contextlib.contextmanager
def serving(*options: str) -> Iterator[Server]:
    """A server that is warm, until the block ends; it is then told to stop and must end well."""
    command = [sys.executable, "-c", "from jaxinfer.cli import app; app()", "serve", *OPTIONS, *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = next((line for line in process.stderr if "serving" in line), "")
        if (found := re.search(r"https?://\S+", said)) is None:
            raise RuntimeError(f"the server did not start: exit code {process.wait()}")
        yield Server(process, found[0])
        process.terminate()
        if code := process.wait(QUIET):
            raise RuntimeError(f"the server ended with exit code {code}")
    finally:
        process.kill()
        process.stderr.close()


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


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in found for child in path.read_text().split()]


def _resident(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

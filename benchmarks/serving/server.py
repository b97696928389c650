"""A `jaxinfer serve` in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

COMMAND = (sys.executable, "-c", "from jaxinfer.cli import app; app()", "serve", "--port=0")
QUIET = 60.0  # seconds that a server has to settle
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"


@dataclass(frozen=True)
class Server:
    """A server that takes requests.

    Attributes:
        said: the lines that it wrote until then.
        seconds: from the start of its process.
    """

    process: subprocess.Popen
    url: str
    said: tuple[str, ...]
    seconds: float

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


def leave_the_device() -> None:
    """Before this process asks for a device: it needs the name alone, and leaves its memory to a server."""
    os.environ[PREALLOCATE] = "false"


@contextlib.contextmanager
def serving(*arguments: str, **variables: str) -> Iterator[Server]:
    """A server that is warm, until the block ends; it is then told to stop and must end well.

    Args:
        arguments: of `jaxinfer serve`.
        variables: of its environment, beside those of this process.

    Raises:
        RuntimeError: it did not start, or did not end well; with what it said.
    """
    own = {name: value for name, value in os.environ.items() if name != PREALLOCATE}
    start, said = time.perf_counter(), []
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True, env=own | variables)
    assert process.stderr is not None
    try:
        url = None
        while url is None and (line := process.stderr.readline()):
            said.append(line)
            url = re.search(r"serving .* at (https?://\S+)", line)
        if url is None:
            raise RuntimeError(f"the server did not start: exit code {process.wait()}\n{''.join(said)}")
        yield Server(process, url[1], tuple(said), time.perf_counter() - start)
        process.terminate()
        if code := process.wait(QUIET):
            raise RuntimeError(f"the server ended with exit code {code}")
    finally:
        process.kill()
        process.stderr.close()


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in found for child in path.read_text().split()]


def _resident(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

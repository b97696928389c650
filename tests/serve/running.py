"""A server in a process of its own, as a user starts it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "steps_per_dispatch": 4}
DTYPE = "float32"  # in which an output does not depend on the batch
COMMAND = "from jaxinfer.cli import app; app()"
COMPILED: dict[str, str] = {}  # variables that say where servers find what earlier ones compiled
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Add two numbers"}]
LONG = {"max_tokens": 900, "temperature": 0, "extra_body": {"ignore_eos": True}}  # for OpenAI's client


@dataclass
class Running:
    """A server that listens, and what it has written to the terminal."""

    process: subprocess.Popen
    url: str
    said: list[str] = field(default_factory=list)
    context: ssl.SSLContext | None = None

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body; a body that is no bytes goes as JSON."""
        with contextlib.closing(self.connect()) as connection:
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, {"content-type": "application/json"} | given)
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()

    def connect(self) -> http.client.HTTPConnection:
        host = self.url.partition("://")[2]
        if self.context is None:
            return http.client.HTTPConnection(host, timeout=120)
        return http.client.HTTPSConnection(host, timeout=120, context=self.context)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        status, _, answer = self.ask("POST", path, body, **headers)
        return status, json.loads(answer)

    def begin(self, body: Any, **headers: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse, bytes]:
        """Asks for a stream of a completion, and reads its first event."""
        connection = self.connect()
        body = json.dumps(body | {"stream": True})
        connection.request("POST", COMPLETION, body, {"content-type": "application/json"} | headers)
        response = connection.getresponse()
        assert response.status == 200
        return connection, response, response.readline()

    @property
    def engines(self) -> list[int]:
        """The processes that run the replicas of the engine, children of the server's, in the order of their start."""
        pid = self.process.pid
        children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return sorted(one for one in children if b"spawn_main" in Path(f"/proc/{one}/cmdline").read_bytes())

    def figures(self, **headers: str) -> dict[str, float]:
        """The figures of `/metrics` by name and labels, and besides those of the replicas their sums by name."""
        status, _, page = self.ask("GET", "/metrics", **headers)
        assert status == 200
        found: dict[str, float] = {}
        for name, _, value in (line.rpartition(" ") for line in page.decode().splitlines() if line[0] != "#"):
            found[name] = float(value)
            if (total := re.sub(r"\{replica=.*\}", "", name)) != name:
                found[total] = found.get(total, 0.0) + float(value)
        return found

    def wait_for(self, seconds: float = 60, **wanted: float) -> None:
        """Waits until figures have the values that are wanted."""
        deadline = time.monotonic() + seconds
        while any((found := self.figures())[f"jaxinfer_{name}"] != value for name, value in wanted.items()):
            assert time.monotonic() < deadline, (wanted, found)
            time.sleep(0.05)

    def wait(self, seconds: float = 60) -> int:
        """The exit code."""
        return self.process.wait(seconds)


@contextlib.contextmanager
def serving(
    *arguments: str, context: ssl.SSLContext | None = None, code: str = COMMAND, **options: Any
) -> Iterator[Running]:
    """A server on a free port, until the block ends; `code` starts the command."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (OPTIONS | options).items()]
    command = [sys.executable, "-c", code, "serve", *arguments, *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest", "COLUMNS": "400"}
    # A server runs more steps than most tests: code that is optimized a little takes it half of the time, and hardly
    # longer to compile.
    environment["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("optimization_level=0", "optimization_level=1")
    environment |= COMPILED
    process = subprocess.Popen(
        [*command, "--port=0", f"--dtype={DTYPE}", "--no-warm-up"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    running = Running(process, "", context=context)
    assert process.stderr is not None
    for line in process.stderr:
        running.said.append(line)
        if found := re.search(r"serving .* at (https?://\S+)", line):
            running.url = found[1]
            break
    reader = threading.Thread(target=lambda: running.said.extend(process.stderr or ()))
    reader.start()
    try:
        assert running.url, "".join(running.said)
        yield running
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()

"""How long a server takes from the start of its process until it listens, on a first start and on a second one."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from benchmarks.record import OURS, Record
from benchmarks.serving.server import Server, serving

LOADING = re.compile(r"imports (\S+) s, device (\S+) s, weights and cache (\S+) s")
WARM_UP = re.compile(r"(\d+) programs in (\S+) s, (\d+) of them from the cache; (\d+) kernels, .* in (\S+) s")


def measure(name: str, folder: Path, arguments: list[str]) -> list[Record]:
    """The records of two starts, the first of which finds nothing compiled, the second all.

    Args:
        name: of the model in the records.
        folder: of its checkpoint, which the system may have in memory.
        arguments: of `jaxinfer serve`.

    Raises:
        RuntimeError: the second start compiled something.
    """
    records = []
    with tempfile.TemporaryDirectory() as compiled:
        for start in ("first", "second"):
            with serving(str(folder), *arguments, JAX_COMPILATION_CACHE_DIR=compiled) as server:
                records += parts(f"{name} server, {start} start", server)
    last = {record.metric: record.value for record in records}
    if compiled_again := last["programs compiled"]:
        raise RuntimeError(f"the second start compiled {compiled_again:g} of {last['programs']:g} programs")
    return records


def parts(case: str, server: Server) -> list[Record]:
    """The records of one start: all of it, and its parts, of which lowering is within the warm-up. What they leave is
    the HTTP process's: its imports before all else, and at the end the tokenizer and the socket."""
    said = "".join(server.said)
    loading, warm_up = LOADING.search(said), WARM_UP.search(said)
    assert loading is not None, said
    assert warm_up is not None, said
    imports, device, model = map(float, loading.groups())
    programs, seconds, found, kernels, lowering = map(float, warm_up.groups())
    times = {
        "ready": server.seconds, "imports": imports, "device": device, "weights and cache": model, "warm-up": seconds,
        "lowering": lowering, "HTTP process": server.seconds - imports - device - model - seconds,
    }  # fmt: skip
    counts = {"programs": programs, "programs compiled": programs - found, "kernels": kernels}
    return [
        *(Record(case, OURS, metric, value, "s") for metric, value in times.items()),
        *(Record(case, OURS, metric, value, metric.split()[0]) for metric, value in counts.items()),
    ]

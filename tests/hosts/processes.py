"""Two processes of a group on this machine, forked from one that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer import checkpoint
from jaxinfer.decode.sampling_params import SamplingParams, StructuredOutputsParams
from jaxinfer.decode.speculative import PromptLookup
from jaxinfer.llm import LLM
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import join, make_mesh
from jaxinfer.roofline import find_hardware
from jaxinfer.serve import worker
from jaxinfer.serve.messages import Setup
from tests.engine.tiny import OPTIONS, drawing_alike, one_rectangle

WITHIN = 120.0  # seconds in which processes start, or end by themselves
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.hosts.processes"])
PROMPTS = ["abcabcabcabc", "def f(x):", "one two one two", "z"]
SPECULATING = replace(OPTIONS, speculation=PromptLookup(2), always_speculate=True)
ALL_OF_IT = SamplingParams(top_p=0.9, logprobs=1)  # so that one sampler serves all requests
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@dataclass(frozen=True)
class Process:
    """One of them: what it has written, and a pipe to it."""

    process: BaseProcess
    connection: Connection
    log: Path

    def told(self) -> Any:
        """The next that it sends."""
        assert self.connection.poll(WITHIN), self.log.read_text()
        return self.connection.recv()

    def ends(self, within: float = WITHIN) -> int | None:
        """The exit code."""
        self.process.join(within)
        return self.process.exitcode


@contextmanager
def two(run: Callable[..., None], folder: Path, *arguments: Any) -> Iterator[list[Process]]:
    """Runs `run(rank, coordinator, connection, *arguments)` in two processes until the block ends; logs go to the
    folder."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    try:
        for rank in range(2):
            here, there = FORKED.Pipe()
            log = folder / f"{run.__name__}-{rank}.log"
            process = FORKED.Process(target=_logged, args=(log, run, rank, coordinator, there, *arguments))
            process.start()
            there.close()
            started.append(Process(process, here, log))
        yield started
    finally:
        for one in started:
            one.process.kill()
            one.process.join()
            one.process.close()
            one.connection.close()


def _logged(log: Path, run: Callable[..., None], *arguments: Any) -> None:
    import jax

    from jaxinfer import machine

    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_platforms", "cpu")
    machine.measure_machine = lambda: find_hardware("h200-measured")  # takes a second
    with log.open("w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    run(*arguments)


# --- what they run


def generating(rank: int, coordinator: str, connection: Connection, folder: Path) -> None:
    """Process 0 sends what `scenario` brings, process 1 how it refuses to generate."""
    with join(coordinator, 2, rank, WITHIN) as group:
        llm = LLM(folder, tensor_parallel_size=2, options=SPECULATING, group=group)
        if group.leads:
            connection.send(scenario(llm))
            return
        try:
            llm.generate(PROMPTS)
        except ValueError as error:
            connection.send(str(error))
        llm.follow()


def dividing(rank: int, coordinator: str, connection: Connection, folder: Path, sizes: dict[str, int]) -> None:
    """Process 0 sends the texts of `PROMPTS` by a model that is divided among both in another way."""
    with join(coordinator, 2, rank, WITHIN) as group:
        llm = LLM(folder, options=OPTIONS, group=group, **sizes)
        if group.leads:
            connection.send(texts(llm))
        else:
            llm.follow()


def texts(llm: LLM) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS[:2], GREEDY)]


def scenario(llm: LLM) -> list[Any]:
    """Requests of all kinds, and what came of them."""
    with one_rectangle():
        return _scenario(drawing_alike(llm))


def _scenario(llm: LLM) -> list[Any]:
    llm.engine.compile_loops(ALL_OF_IT)
    kinds = [
        GREEDY,
        SamplingParams(seed=3, max_tokens=9, ignore_eos=True, presence_penalty=0.5, repetition_penalty=1.2),
        SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1, prompt_logprobs=1),
        SamplingParams(temperature=0, max_tokens=9, structured_outputs=StructuredOutputsParams(regex="[0-9]{3}x+")),
    ]
    found: list[Any] = [_seen(llm, kinds)]
    stream = llm.stream(PROMPTS[0], GREEDY)
    found.append(next(stream).token_ids)
    stream.close()  # aborts the request
    masks, llm.engine._constraints.masks = llm.engine._constraints.masks, _fail
    try:
        llm.generate(PROMPTS[3], kinds[3])
    except RuntimeError as error:
        found.append(str(error))
    llm.engine._constraints.masks = masks
    found.append(_seen(llm, kinds))  # with an empty cache again
    return found


def _seen(llm: LLM, kinds: list[SamplingParams]) -> list[Any]:
    outputs = llm.generate(PROMPTS, kinds)
    scored = [output.prompt_logprobs and len(output.prompt_logprobs) for output in outputs]
    return [(output.outputs[0].text, output.outputs[0].token_ids) for output in outputs] + scored


def _fail(*_: Any) -> Any:
    raise RuntimeError("the masks cannot be made")


def loading(rank: int, coordinator: str, connection: Connection, folders: list[Path]) -> None:
    """Each sends what it has of the parameters, and the error of a checkpoint that is damaged: the last one."""
    with join(coordinator, 2, rank, WITHIN):
        mesh, *good, bad = make_mesh(2), *folders
        connection.send([shards(folder, mesh)[0] for folder in good])
        try:
            shards(bad, mesh)
        except ValueError as error:
            connection.send(str(error))


def shards(folder: Path, mesh: Any) -> list[dict[str, np.ndarray]]:
    """What the parameters are on each device of this process, in order."""
    arrays = checkpoint.load(folder, Model(read_config(folder), mesh))
    count = len(mesh.local_devices)
    assert {len(array.addressable_shards) for array in arrays.values()} == {count}
    return [
        {path: np.asarray(array.addressable_shards[index].data) for path, array in arrays.items()}
        for index in range(count)
    ]


def serving(rank: int, coordinator: str, connection: Connection, folder: Path) -> None:
    """The engine processes of `jaxinfer serve`, for one request after the other: there are fewer programs to warm."""
    options = {name: getattr(OPTIONS, name) for name in ("max_num_batched_tokens", "page_size", "num_pages")}
    options["max_num_seqs"] = 1
    group = {"coordinator": coordinator, "num_processes": 2, "process_id": rank, "timeout": WITHIN}
    worker.main(connection, Setup(str(folder), {"tensor_parallel_size": 2}, options, group=group), time.monotonic())


def stuck(rank: int, coordinator: str, connection: Connection) -> None:
    """Process 1 runs a program that process 0 never runs, which ends without a word."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    from jaxinfer.parallel import TENSOR

    with join(coordinator, 2, rank, WITHIN):
        mesh = make_mesh(2)
        if rank == 0:
            connection.recv()
            os._exit(9)
        with jax.set_mesh(mesh):
            x_D = jnp.zeros(2, device=jax.NamedSharding(mesh, P(TENSOR)))
            connection.send("runs")
            jnp.sum(x_D).block_until_ready()


def said(log: str) -> list[str]:
    """The lines about ends."""
    return re.findall(r"error: (.*)", log)

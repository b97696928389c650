"""Two processes with a device each give what one process gives, and neither outlasts the other."""

import os
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from jaxinfer import checkpoint
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Request
from jaxinfer.llm import LLM
from jaxinfer.parallel import make_mesh
from jaxinfer.serve.messages import Add, Failed, Ready, Step, Stop
from tests.engine.tiny import CONFIG, ONE_LAYER, OPTIONS, write_checkpoint
from tests.golden.load import load
from tests.golden.weights import write_checkpoint as write_golden
from tests.hosts.processes import (
    SPECULATING,
    dividing,
    generating,
    loading,
    said,
    scenario,
    serving,
    shards,
    stuck,
    texts,
    two,
)  # fmt: skip

SOON = 10.0  # seconds in which a process ends after another
REQUEST = Request(1, (5, 6, 7), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), (), 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("hosts") / "one-layer", ONE_LAYER)


def test_two_processes_give_the_text_of_one(folder, tmp_path):
    with two(generating, tmp_path, folder) as (leader, other):
        alone = scenario(LLM(folder, options=SPECULATING))
        assert leader.told() == alone
        assert other.told() == "process 1 of 2 follows: call `follow` here, and generate in process 0"
        assert [one.ends() for one in (leader, other)] == [0, 0], other.log.read_text()


def test_processes_are_stages_of_a_pipe(tmp_path):
    """Each then holds no part of half of the layers."""
    folder = write_checkpoint(tmp_path / "alike", CONFIG | {"layer_types": ["full_attention"] * 2})
    with two(dividing, tmp_path, folder, {"pipeline_parallel_size": 2}) as processes:
        alone = texts(LLM(folder, options=OPTIONS))
        assert processes[0].told() == alone
        assert [one.ends() for one in processes] == [0, 0], processes[1].log.read_text()


def test_each_process_has_its_own_shards_of_a_checkpoint(tmp_path):
    """Published ones, with experts and with KV heads that both repeat, and our own layout; and one with a NaN."""
    folders = []
    for case in ("mixtral", "gemma"):
        folders.append(tmp_path / case)
        folders[-1].mkdir()
        write_golden(folders[-1], load(case))
    folders.append(tmp_path / "native")
    checkpoint.convert(folders[0], folders[-1], make_mesh(1))
    folders.append(tmp_path / "damaged")
    shutil.copytree(folders[0], folders[-1])
    with next(folders[-1].glob("*.safetensors")).open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\xff" * 64)
    with two(loading, tmp_path, folders) as processes:
        whole = [shards(folder, make_mesh(2)) for folder in folders[:-1]]
        for rank, process in enumerate(processes):
            for found, expected in zip(process.told(), whole, strict=True):
                assert found.keys() == expected[rank].keys()
                for path, array in found.items():
                    np.testing.assert_array_equal(array, expected[rank][path], strict=True)
        errors = [process.told() for process in processes]
        assert errors[0] == errors[1]
        assert "is not finite" in errors[0]
        assert [process.ends() for process in processes] == [0, 0]


def tokens(leader, count: int) -> list[int]:
    """What the engine brings to the only request."""
    found = []
    while len(found) < count:
        message = leader.told()
        assert isinstance(message, Step)
        found += [token for one in message.tokens for token in one.tokens]
    return found


@pytest.fixture(scope="module")
def expected(folder):
    llm = LLM(folder, options=OPTIONS)
    (output,) = llm.generate([list(REQUEST.prompt_ids)], REQUEST.params)
    return list(output.outputs[0].token_ids)


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_server_on_two_hosts(folder, tmp_path, expected, how):
    with two(serving, tmp_path, folder) as (leader, other):
        assert isinstance(leader.told(), Ready)
        assert other.told().which == "process 1 of 2"
        leader.connection.send(Add((REQUEST,)))
        assert tokens(leader, len(expected)) == expected
        if how == "stop":
            leader.connection.send(Stop())
            assert [one.ends() for one in (leader, other)] == [0, 0], other.log.read_text()
            return
        leader.connection.send(Add((replace(REQUEST, id=2, params=replace(REQUEST.params, max_tokens=80)),)))
        os.kill(other.process.pid, signal.SIGKILL)
        start = time.monotonic()
        while not isinstance(message := leader.told(), Failed):
            pass
        assert message.message.startswith("process 1 on ")
        assert message.message.endswith(" is gone; the group of 2 processes ends")
        assert leader.ends(SOON) == 1
        assert time.monotonic() - start < SOON


def test_a_program_that_waits_for_a_process_that_is_gone_ends(tmp_path):
    with two(stuck, tmp_path) as (leader, other):
        assert other.told() == "runs"
        leader.connection.send("die")
        assert leader.ends() == 9
        # JAX's own watch may be first: it aborts the process, and says that another task died.
        assert other.ends(SOON) in (1, -signal.SIGABRT)
        log = other.log.read_text()
        assert said(log) == ["process 0 on 127.0.0.1 is gone; the group of 2 processes ends"] or "task died" in log

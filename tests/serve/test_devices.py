"""How the replicas of the engine share the GPUs of a machine."""

import subprocess
import sys

import jax
import pytest

from jaxinfer.serve import devices
from jaxinfer.serve.devices import VISIBLE, count_gpus, shares, visible_gpus


@pytest.fixture
def gpus(monkeypatch):
    """Makes this a machine whose driver shows so many GPUs."""

    def set_up(count: int, visible: str | None = None, platforms: str | None = None, plugin: object = "a plugin"):
        monkeypatch.setattr(devices, "count_gpus", lambda: count)
        monkeypatch.setattr(devices, "find_spec", lambda name: plugin)
        for name, value in ((VISIBLE, visible), ("JAX_PLATFORMS", platforms)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)

    return set_up


@pytest.mark.parametrize(
    ("visible", "replicas", "each", "given"),
    [
        (None, 4, 1, ["0", "1", "2", "3"]),
        (None, 2, 2, ["0,1", "2,3"]),
        ("7,5,2,0", 2, 2, ["7,5", "2,0"]),
        ("GPU-a, GPU-b,GPU-c,GPU-d", 3, 1, ["GPU-a", "GPU-b", "GPU-c"]),
        (None, 1, 2, [None]),  # sees them all
    ],
)
def test_replicas_have_gpus_of_their_own(gpus, visible, replicas, each, given):
    gpus(4, visible)
    assert shares(replicas, each) == given


def test_what_the_driver_does_not_know_is_not_shared_out(gpus):
    gpus(1, "3,9,4")  # 9 is none: the driver stops there
    assert visible_gpus() == ["3"]


@pytest.mark.parametrize(
    "machine",
    [{"platforms": "cpu"}, {"platforms": "cpu,cuda"}, {"plugin": None}, {"count": 0}],
)
def test_where_jax_runs_on_a_cpu_every_process_has_its_own(gpus, machine):
    gpus(**{"count": 2} | machine)
    assert shares(3, 2) == [None, None, None]


@pytest.mark.parametrize(("replicas", "each", "needed", "fitting"), [(5, 1, 5, 4), (2, 3, 6, 1), (2, 8, 16, 0)])
def test_more_replicas_than_the_gpus_allow_are_refused(gpus, replicas, each, needed, fitting):
    gpus(4, platforms="cuda")
    sizes = f"data_parallel_size = {replicas} replicas with tensor_parallel_size = {each} need {needed} GPUs"
    with pytest.raises(ValueError, match=f"{sizes}, and there are 4; replicas that would fit: {fitting}"):
        shares(replicas, each)


def test_gpus_that_share_sequences_count_too(gpus):
    gpus(4, platforms="cuda")
    assert shares(2, 1, 1, 2) == ["0,1", "2,3"]
    sizes = "tensor_parallel_size = 2 and context_parallel_size = 2 need 8 GPUs, and there are 4; .* would fit: 1"
    with pytest.raises(ValueError, match=sizes):
        shares(2, 2, 1, 2)


def test_each_replica_has_the_devices_of_all_stages(gpus):
    gpus(8, platforms="cuda")
    assert shares(2, 2, 2) == ["0,1,2,3", "4,5,6,7"]
    with pytest.raises(ValueError, match=r"tensor_parallel_size = 2 and pipeline_parallel_size = 3 need 12 GPUs"):
        shares(2, 2, 3)


def test_an_engine_process_sees_its_share_before_jax_starts():
    code = (
        "import multiprocessing, os; from jaxinfer.serve import worker; from jaxinfer.serve.messages import *\n"
        f"worker.load = lambda *_: Failed('input', os.environ[{VISIBLE!r}])\n"
        "here, there = multiprocessing.Pipe()\n"
        "try: worker.main(there, Setup(None, devices='2,3'), 0.0)\n"
        "except SystemExit: print(here.recv().message)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "2,3\n"


@pytest.mark.gpu
def test_as_many_gpus_are_counted_as_jax_finds():
    assert count_gpus() == len(visible_gpus()) == len(jax.devices())

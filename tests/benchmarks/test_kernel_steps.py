"""The prefill kernel without its steps: still a kernel, another one, and measured beside the whole."""

import json
import re

import jax
import pytest

from benchmarks.kernels import steps
from benchmarks.kernels.ops import OPS
from pallas_kernels.flash_attention import consumer, mosaic_gpu
from pallas_kernels.flash_attention.problems import Problem as Prefill
from pallas_kernels.models import Heads
from tests.benchmarks.tiny import MACHINE, TINY
from tests.pallas_kernels.gpu_program import lower

PREFILL = TINY["flash_attention"]
pytestmark = pytest.mark.usefixtures("short_programs")


def test_every_step_can_be_taken_out_and_comes_back():
    problem = Prefill(Heads(4, 2, 64), 1, 128, 64)
    shapes = jax.eval_shape(lambda key: OPS["flash_attention"].arguments(problem, key), jax.random.key(0))
    before = mosaic_gpu.Items, consumer._row_softmax
    whole, bare = (steps.without(problem, out).call for out in ((), tuple(steps.STEPS)))
    assert lower(bare, shapes).count("@mosaic_gpu_v2") == 1
    first, second = (re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(call)(shapes))) for call in (whole, bare))
    assert first != second
    assert (mosaic_gpu.Items, consumer._row_softmax) == before


def test_each_variant_is_held_against_the_whole_kernel_of_its_round(monkeypatch, tmp_path):
    """Here all of them run as XLA, in one program."""
    plain, start, started = OPS["flash_attention"].implementations["xla"], steps.start, []

    def start_once(*given):
        started[:] = started or [start(*given)]
        return started[0]

    monkeypatch.setattr(steps, "without", lambda problem, out: plain(problem))
    monkeypatch.setattr(steps, "start", start_once)
    monkeypatch.setattr(steps.op, "PROBLEMS", PREFILL.problems)
    monkeypatch.setattr(steps.op, "OP", PREFILL)
    monkeypatch.setattr(steps, "measure_machine", lambda: MACHINE)
    name = next(iter(PREFILL.problems))
    steps.main(["--case", name, "--rounds", "2", "--output", str(tmp_path)])
    records = json.loads((tmp_path / "steps.json").read_text())["records"]
    assert len(records) == 2 * len(steps.VARIANTS)
    ratios = {record["case"]: record["value"] for record in records if record["unit"] == "x"}
    assert ratios.pop(f"flash_attention {name} whole") == 1
    assert len(ratios) == len(steps.STEPS) + 1
    assert all(ratio > 0 for ratio in ratios.values())

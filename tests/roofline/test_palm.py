"""Bounds beside Pope et al. 2022, "Efficiently Scaling Transformer Inference": PaLM 540B on 64 TPU v4.

29 ms a token with int8 weights and 76 % of the matmul peak in processing tokens, says the abstract; its configurations
have 64 sequences for the one and 512 prompts of 2,048 tokens for the other, and 2 N FLOPs count for a token. A bound
beyond what they measured is wrong.
"""

from pathlib import Path

import pytest

from jaxinfer.cli.models import find_model
from jaxinfer.roofline import Mesh, Precision, find_hardware, make_plan, parameters, prefill

DEVICES, CONTEXT = 64, 2048
TPU, PALM, PADDED = find_hardware("tpu-v4"), find_model("palm-540b"), find_model("palm-540b-64-heads")
README = Path(__file__).parents[2] / "README.md"


PLAN = make_plan(PADDED, TPU, 64, CONTEXT, Precision("int8"), Mesh(tensor=DEVICES))
PREFILL = prefill(PADDED, CONTEXT, sequences=512, tensor_parallel=DEVICES)


def milliseconds() -> float:
    """Of a decode step, at the least."""
    return PLAN.decode.limit(TPU) * 1e3


def utilization() -> float:
    """Of the matmul peak, at the most: FLOPs of the model as published, without those of padding and attention."""
    return 2 * parameters(PALM) * PREFILL.tokens / (DEVICES * TPU.rate("bf16") * PREFILL.limit(TPU))


def test_the_model_has_the_published_size():
    assert parameters(PALM) == 540_356_474_880  # 540.35 B, as its table says
    assert parameters(PADDED) - parameters(PALM) == pytest.approx(18e9, rel=0.02)  # as the padding is said to cost


def test_the_machine_is_the_one_of_the_paper():
    assert (TPU.rate("bf16"), TPU.interconnect) == (275e12, 270e9)
    assert TPU.bandwidth == pytest.approx(1.2e12, rel=0.03)


def test_no_bound_is_beyond_what_was_measured():
    assert PLAN.memory.fits
    assert milliseconds() < 29
    assert 1 > utilization() > 0.76


def test_the_readme_has_bounds_and_ratios():
    step, used = milliseconds(), utilization()
    text = README.read_text()
    assert f"| ms of a decode step, 64 sequences, int8 weights | 29 | {step:.1f} | {29 / step:.2f} |" in text
    assert f"| matmul peak in a prefill of 512 prompts | 76% | {used:.0%} | {used / 0.76:.2f} |" in text


def test_the_readme_says_where_the_bounds_come_from():
    (decode,), busy, limit = PLAN.decode.grid, PREFILL.times(TPU), PREFILL.limit(TPU)
    reads = decode.parts["attention"].limit(TPU) / decode.limit(TPU)
    others = ("norms", "last layer's norms", "last norm", "all-reduce", "last all-reduce", "look-up")
    matmuls = sum(part.limit(TPU) for name, part in PREFILL.parts.items() if name not in others)
    text = " ".join(README.read_text().split())
    assert f"Of the decode step's bound {reads:.0%} are the cache's" in text
    padding = 1 - parameters(PALM) / parameters(PADDED)
    assert f"Of the prefill's {matmuls / limit:.0%} are matmuls, {padding:.0%} of them padding" in text
    assert f"What it sends takes {busy['interconnect'] / limit:.0%} as long" in text

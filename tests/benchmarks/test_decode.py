"""The benchmark of a whole model, on a small one."""

import numpy as np
import pytest

from benchmarks import decode
from benchmarks.bench import Bench, Subject
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.roofline import find_hardware
from tests.engine.tiny import ONE_LAYER
from tests.model.random_params import random_params


def subject(implementation: str, cache_dtype: str | None = None, chunk: int = 64, config: dict = ONE_LAYER) -> Subject:
    model, machine = Model(read_config(config), make_mesh(1)), find_hardware("h200")
    params = random_params(model, 0)
    return Subject("tiny", model, params, 4, 2, implementation, cache_dtype, chunk, machine, machine)


def test_the_records_of_a_model(monkeypatch):
    """They are named by its cache and by the chunks of a prompt."""
    monkeypatch.setattr(decode, "PROMPT", 5)
    monkeypatch.setattr(decode, "NEW", 4)
    quantized = subject("auto", "float8_e4m3fn", chunk=3)
    records = [record for group in decode.measure(quantized, batches=[2], prompts=[7]) for record in group]
    found = {(record.case, record.implementation, record.metric) for record in records}
    batch, prompt = "tiny B2 fp8", "tiny prompt 7 in chunks of 3 fp8"
    assert {case for case, _, _ in found} == {"machine", batch, prompt}
    assert found >= {
        (batch, "xla", "decode"),
        (batch, "xla", "decode step"),
        (batch, "plan with XLA attention", "decode step"),
        (batch, "plan with XLA attention", "memory at peak"),
        (prompt, "xla", "first token"),
        (prompt, "plan with XLA attention", "first token"),
    }
    assert all(record.value > 0 for record in records if record.case != "machine")


def test_chunks_bring_the_same_token_and_are_planned_one_by_one():
    tokens = 50
    chosen = []
    bench = Bench(subject("auto"), 2, tokens + 1)
    for chunk in (tokens, 16):  # the last of them is padded
        bench.random = np.random.default_rng(0)  # for the same prompts
        bench.prefill(tokens, chunk)
        assert bench.state.length_B.tolist() == [tokens] * 2
        chosen.append(bench.state.token_B.tolist())
    assert chosen[0] == chosen[1]
    whole, *none = decode.predicted_prefill(bench.subject.model.config, tokens, "mosaic_gpu")
    costs = decode.predicted_prefill(bench.subject.model.config, tokens, "mosaic_gpu", chunk=16)
    assert not none
    assert [cost.tokens for cost in costs] == [16, 16, 16, 2]
    assert sum(cost.bytes for cost in costs) > whole.bytes  # weights and earlier keys are read again


def test_attention_runs_as_it_is_named():
    """The kernel takes no float32, and says so."""
    with pytest.raises(ValueError, match=r"'mosaic_gpu' of flash_attention cannot run: q\.dtype is float32"):
        decode.run_first_token(subject("mosaic_gpu"), 7)
    record, *_ = decode.run_first_token(subject("reference"), 7)
    assert (record.case, record.implementation) == ("tiny prompt 7", "reference")

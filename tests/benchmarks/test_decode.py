"""The benchmark of a whole model, on a small one."""

import numpy as np
import pytest

from benchmarks import decode
from benchmarks.bench import Bench, Subject
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.roofline import Mesh, find_hardware
from jaxinfer.roofline.mesh import ONE
from jaxinfer.roofline.pipeline import decode_on
from tests.engine.tiny import CONFIG, ONE_LAYER
from tests.model.random_params import random_params

UNIFORM = CONFIG | {"layer_types": ["full_attention"] * 2}


def subject(
    implementation: str,
    cache_dtype: str | None = None,
    chunk: int = 64,
    config: dict = ONE_LAYER,
    mesh: Mesh = ONE,
) -> Subject:
    devices = make_mesh(mesh.tensor, mesh.pipe)
    model, machine = Model(read_config(config), devices), find_hardware("h200")
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


@pytest.mark.parametrize("mesh", [Mesh(tensor=2), Mesh(pipe=2)])
def test_the_records_of_two_devices(mesh, monkeypatch):
    """They are named by the mesh, and set against its limit: the links' share of it too."""
    monkeypatch.setattr(decode, "PROMPT", 5)
    monkeypatch.setattr(decode, "NEW", 4)
    shared = subject("auto", config=UNIFORM, mesh=mesh)
    records = [record for group in decode.measure(shared, batches=[2], prompts=[7]) for record in group]
    assert {record.case for record in records} == {"machine", f"tiny B2 on {mesh}", f"tiny prompt 7 on {mesh}"}
    (step,) = (one for one in records if (one.implementation, one.metric) == ("xla", "decode step"))
    limit = decode_on(shared.model.config, mesh, 2, decode.PROMPT + decode.NEW // 2, shared.precision)
    assert step.roofline_fraction * step.value == pytest.approx(limit.limit(shared.ceilings) * 1e3)


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
    (whole,) = decode.predicted_prefill(bench.subject.model.config, tokens, "mosaic_gpu")
    steps = decode.predicted_prefill(bench.subject.model.config, tokens, "mosaic_gpu", chunk=16)
    assert [step.tokens for step in steps] == [16, 16, 16, 2]
    read = [sum(cost.bytes for step in some for cost in step.grid) for some in ([whole], steps)]
    assert read[0] < read[1]  # weights and earlier keys are read again


def test_attention_runs_as_it_is_named():
    """The kernel takes no float32, and says so."""
    with pytest.raises(ValueError, match=r"'mosaic_gpu' of flash_attention cannot run: q\.dtype is float32"):
        decode.run_first_token(subject("mosaic_gpu"), 7)
    record, *_ = decode.run_first_token(subject("reference"), 7)
    assert (record.case, record.implementation) == ("tiny prompt 7", "reference")

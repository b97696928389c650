"""The quick prediction of a program is that of the cost model."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.model.config import MoEConfig
from jaxinfer.roofline import MEASURED, Attended, Mesh, Precision, Share, StepTimes, decode_step, prefill
from jaxinfer.roofline.attention import AttentionModel
from jaxinfer.roofline.pipeline import decode_on, prefill_on
from tests.roofline.small import small, sparse, windowed

H200 = MEASURED["h200-measured"]
MODELS = [
    small(layers=windowed(None, 100, 7)),
    small(num_kv_heads=8, layers=sparse(MoEConfig(16, 2, 256))),
]
PRECISIONS = [Precision(), Precision(cache="int8"), Precision(weights="int4", activations="bf16")]
CASES = st.tuples(
    st.sampled_from(MODELS), st.sampled_from(PRECISIONS),
    st.sampled_from([Mesh(), Mesh(tensor=2), Mesh(context=2), Mesh(tensor=2, context=4)]),
    st.sampled_from(["flash", "materialized"]),
)  # fmt: skip
counts = st.integers(1, 300)
DEEP = small(layers=windowed(*[None, 100] * 4))


def times(config, precision, mesh, attention) -> StepTimes:
    return StepTimes(config, H200, precision, mesh, attention, attention)


@given(case=CASES, batch=counts, cached=counts, queries=st.sampled_from([1, 2, 9]))
def test_a_step_that_decodes_alone(case, batch, cached, queries):
    config, precision, mesh, attention = case
    context, share = cached + queries, Share(mesh.context)
    expected = decode_step(config, batch, context, precision, mesh.tensor, queries, attention, share).predict(H200)
    quick = times(*case)
    reading = quick.decoding([context] * batch, queries)
    assert quick.decode(batch, reading, queries) == pytest.approx(expected, rel=1e-12)


@given(case=CASES, sequences=counts, tokens=counts.map(lambda half: 4 * half), cached=st.integers(0, 300))
def test_a_step_that_prefills_alone(case, sequences, tokens, cached):
    config, precision, mesh, attention = case
    share, quick, chunks = Share(mesh.context), times(*case), Attended()
    cost = prefill(config, tokens, sequences, cached, precision, mesh.tensor, attention=attention, share=share)
    for _ in range(sequences):
        chunks = chunks.plus(quick.chunk(tokens, cached))
    found = quick.mixed(sequences * tokens, sequences, quick.decoding([]), chunks)
    assert found == pytest.approx(cost.predict(H200), rel=1e-12)


@given(case=CASES, cached=st.lists(counts, min_size=1), queries=st.sampled_from([1, 2, 9]))
def test_the_attention_of_many_is_the_sum_of_each(case, cached, queries):
    config, precision, mesh, attention = case
    model, total = AttentionModel(config, precision, mesh.tensor, attention), Attended()
    for tokens in cached:
        total = total.plus(model.sequence(queries, tokens, decodes=True))
    found = model.decoding([tokens + queries for tokens in cached], queries=queries)
    assert found == pytest.approx(total, rel=1e-12)
    assert times(*case).decoding([]) == Attended()


@pytest.mark.parametrize("mesh", [Mesh(pipe=2), Mesh(pipe=4, tensor=2)])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_a_pipe_takes_what_is_planned(mesh, batch):
    """Decode steps that go round it, and a prompt, which it drains after."""
    quick = StepTimes(DEEP, H200, mesh=mesh)
    planned = decode_on(DEEP, mesh, batch, 300).predict(H200)
    assert quick.decode(batch, quick.decoding([300] * batch)) == pytest.approx(planned, rel=1e-12)
    prompt = prefill_on(DEEP, mesh, 1024).predict(H200)
    assert quick.mixed(1024, 1, Attended(), quick.chunk(1024, 0)) == pytest.approx(prompt, rel=0.05)  # equal parts


def test_devices_that_share_a_step_shorten_it(published):
    """Of a large model, at a size that is bound by memory or by arithmetic."""
    config, contexts = published("llama-3-8b"), [4000] * 64
    alone = StepTimes(config, H200)
    decoding = alone.decode(64, alone.decoding(contexts))
    reading = alone.mixed(8192, 64, Attended(), alone.chunk(8192, 0))
    for mesh in (Mesh(tensor=2), Mesh(pipe=2), Mesh(context=2)):
        shared = StepTimes(config, H200, mesh=mesh)
        assert shared.decode(64, shared.decoding(contexts)) < 0.9 * decoding
        assert shared.mixed(8192, 64, Attended(), shared.chunk(8192, 0)) < 0.7 * reading


@pytest.mark.parametrize("tokens", [8, 8192])
def test_experts_are_reached_in_the_quicker_way(published, tokens):
    config, mesh = published("mixtral-8x7b"), Mesh(tensor=8)
    quick = StepTimes(config, H200, mesh=mesh)
    found = quick.mixed(tokens, 1, Attended(), quick.chunk(tokens, 0))
    ways = {how: prefill_on(config, mesh, tokens, experts=how).predict(H200) for how in ("replicated", "all-to-all")}
    assert found == pytest.approx(min(ways.values()), rel=1e-12)
    assert min(ways, key=ways.__getitem__) == ("replicated" if tokens == 8 else "all-to-all")


def test_steps_that_drain_a_pipe_take_longer(published):
    """All of a method that is shown what leaves several stages; and those with proposals, whatever the method."""
    both = [StepTimes(published("llama-3-8b"), H200, mesh=Mesh(pipe=4), circulates=one) for one in (True, False)]
    goes_round, drains = (times.decode(64, times.decoding([4000] * 64)) for times in both)
    assert goes_round < 0.7 * drains  # four stages read keys at once
    verifying = {times.decode(64, times.decoding([300] * 64, 4), 4) for times in both}
    assert len(verifying) == 1


def test_a_step_of_both_takes_longer_than_of_one():
    for mesh in (Mesh(), Mesh(tensor=2, context=2), Mesh(pipe=2)):
        quick = StepTimes(DEEP, H200, mesh=mesh)
        reading, chunks = quick.decoding([200] * 8), quick.chunk(56, 100)
        both = quick.mixed(64, 8, reading, chunks)
        assert both > quick.mixed(64, 8, Attended(), chunks)
        assert both < quick.mixed(64, 8, Attended(), chunks) + quick.decode(8, reading)


def test_a_device_without_the_models_matmul_is_refused():
    only_bf16 = replace(H200, flops={"bf16": 1e15})
    with pytest.raises(ValueError, match="has no fp16 matmul"):
        StepTimes(MODELS[0], only_bf16, Precision.all_in("float16"))

"""The quick prediction of a program is that of the cost model."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.model.config import MoEConfig
from jaxinfer.roofline import MEASURED, Attended, Precision, StepTimes, decode_step, prefill
from jaxinfer.roofline.attention import AttentionModel
from tests.roofline.small import small, sparse, windowed

H200 = MEASURED["h200-measured"]
MODELS = [
    small(layers=windowed(None, 100, 7)),
    small(num_kv_heads=8, layers=sparse(MoEConfig(16, 2, 256))),
]
PRECISIONS = [Precision(), Precision(cache="int8"), Precision(weights="int4", activations="bf16")]
CASES = st.tuples(
    st.sampled_from(MODELS), st.sampled_from(PRECISIONS), st.sampled_from([1, 2]),
    st.sampled_from(["flash", "materialized"]),
)  # fmt: skip
counts = st.integers(1, 300)


def times(config, precision, devices, attention) -> StepTimes:
    return StepTimes(config, H200, precision, devices, attention, attention)


@given(case=CASES, batch=counts, cached=counts, queries=st.sampled_from([1, 2, 9]))
def test_a_step_that_decodes_alone(case, batch, cached, queries):
    config, precision, devices, attention = case
    context, rows = cached + queries, batch * queries
    expected = decode_step(config, batch, context, precision, devices, queries, attention).predict(H200)
    quick = times(*case)
    assert quick.rest(rows, rows) + quick.decoding([context] * batch, queries) == pytest.approx(expected, rel=1e-12)


@given(case=CASES, sequences=counts, tokens=counts, cached=st.integers(0, 300))
def test_a_step_that_prefills_alone(case, sequences, tokens, cached):
    config, precision, devices, attention = case
    expected = prefill(config, tokens, sequences, cached, precision, devices, attention=attention).predict(H200)
    quick = times(*case)
    chunks = Attended()
    for _ in range(sequences):
        chunks = chunks.plus(quick.chunk(tokens, cached))
    total = quick.rest(sequences * tokens, sequences) + quick.prefilling(chunks)
    assert total == pytest.approx(expected, rel=1e-12)


@given(case=CASES, cached=st.lists(counts, min_size=1), queries=st.sampled_from([1, 2, 9]))
def test_the_attention_of_many_is_the_sum_of_each(case, cached, queries):
    model, total = AttentionModel(*case), Attended()
    for tokens in cached:
        total = total.plus(model.sequence(queries, tokens, decodes=True))
    found = model.decoding([tokens + queries for tokens in cached], queries=queries)
    assert found == pytest.approx(total, rel=1e-12)
    assert times(*case).decoding([]) == 0


def test_a_device_without_the_models_matmul_is_refused():
    only_bf16 = replace(H200, flops={"bf16": 1e15})
    with pytest.raises(ValueError, match="has no fp16 matmul"):
        StepTimes(MODELS[0], only_bf16, Precision.all_in("float16"))

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.model.config import MoEConfig
from jaxinfer.roofline.attention import query_key_pairs
from jaxinfer.roofline.cost import Cost, Work
from jaxinfer.roofline.hardware import DATASHEETS, MEASURED
from jaxinfer.roofline.precision import Precision
from jaxinfer.roofline.step import compute_bound_batch, decode_step, experts_touched, prefill
from tests.roofline.small import small, sparse, windowed

H200 = MEASURED["h200-measured"]
DENSE = small(
    hidden_size=512, intermediate_size=2048, num_kv_heads=4, layers=windowed(None, 100), context=8192
)  # fmt: skip
SPARSE = dataclasses.replace(DENSE, layers=sparse(MoEConfig(16, 2, 256)))
counts = st.integers(1, 300)


@pytest.mark.parametrize("name", ["llama-3-8b", "mixtral-8x7b", "gemma-2-9b"])
@settings(max_examples=20)
@given(batch=counts, context=counts)
def test_decode_costs_grow_with_batch_and_with_context(published, name, batch, context):
    config = published(name)
    cost = decode_step(config, batch, context)
    for more in (decode_step(config, batch + 1, context), decode_step(config, batch, context + 1)):
        assert more.flops > cost.flops
        assert more.bytes > cost.bytes
        assert more.limit(H200) > cost.limit(H200)


@given(tokens=st.integers(1, 40), cached=st.integers(0, 40), window=st.none() | st.integers(1, 50))
def test_pairs_are_those_of_the_mask(tokens, cached, window):
    queries = np.arange(cached, cached + tokens)[:, None]
    keys = np.arange(cached + tokens)[None, :]
    seen = (keys <= queries) & (queries - keys < (window or 10**9))
    assert query_key_pairs(tokens, cached, window) == seen.sum()


@given(first=counts, second=counts, cached=st.integers(0, 300))
def test_a_prefill_in_chunks_does_the_attention_of_one_at_once(first, second, cached):
    whole = prefill(DENSE, first + second, cached=cached).parts["attention"].flops
    chunks = prefill(DENSE, first, cached=cached), prefill(DENSE, second, cached=cached + first)
    assert sum(chunk.parts["attention"].flops for chunk in chunks) == whole


@given(context=counts)
def test_a_prefill_does_the_matmuls_of_decoding_token_by_token_but_reads_the_weights_once(context):
    at_once, steps = prefill(DENSE, context), [decode_step(DENSE, 1, length) for length in range(1, context + 1)]
    # What follows the last attention is of one token alone.
    parts = {"projections": "last output", "mlp": "last mlp", "norms": "last layer's norms"}
    for part, last in parts.items():
        of_all = at_once.parts[part].flops + context * at_once.parts[last].flops
        assert of_all == sum(step.parts[part].flops for step in steps)
        assert at_once.parts[part].weights + at_once.parts[last].weights == steps[0].parts[part].weights
    assert at_once.parts["attention"].flops == sum(step.parts["attention"].flops for step in steps)


@pytest.mark.parametrize(
    ("precision", "narrow", "wide"),
    [
        (Precision.all_in("float16"), "fp16", "fp16"),
        (Precision("int8", "int8", "fp16"), "fp16", "fp16"),
        (Precision("int8", "fp16", "int8"), "int8", "fp16"),
        (Precision("fp16", "int8", "int8"), "int8", "fp16"),
        (Precision("int8", "int8", "int8"), "int8", "bf16"),
    ],
)
def test_operands_follow_the_precision(precision, narrow, wide):
    parts = decode_step(SPARSE, 8, 1024, precision, tensor_parallel=2).parts
    quantized = {"projections", "mlp", "experts"}
    assert {parts[name].dtype for name in quantized} == {narrow}
    assert {part.dtype for name, part in parts.items() if name not in quantized} == {wide}


def test_work_without_flops_asks_for_no_matmul():
    idle = Work(weights=320e9, dtype="bf16")
    assert idle.times(DATASHEETS["t4"]) == {"compute": 0, "memory": 1, "interconnect": 0}
    with pytest.raises(ValueError, match="t4 has no bf16 matmul"):
        dataclasses.replace(idle, flops=1).times(DATASHEETS["t4"])


def test_verifying_drafted_tokens_reads_the_weights_once_and_the_cache_about_once():
    one, five = decode_step(DENSE, 8, 4096), decode_step(DENSE, 8, 4096, queries=5)
    assert five.tokens == 5 * one.tokens
    assert five.parts["mlp"].weights == one.parts["mlp"].weights
    assert five.parts["mlp"].flops == 5 * one.parts["mlp"].flops
    assert five.parts["attention"].cache < 1.01 * one.parts["attention"].cache
    assert five.parts["attention"].wasted == 0  # tiles of 128 queries are flash attention's


@pytest.mark.parametrize("devices", [2, 4])
def test_tensor_parallelism_divides_matmuls_attention_and_cache(devices):
    one, many = decode_step(DENSE, 8, 1024), decode_step(DENSE, 8, 1024, tensor_parallel=devices)
    for part in ("projections", "attention", "mlp", "head"):
        assert many.parts[part].flops * devices == one.parts[part].flops
        assert many.parts[part].bytes * devices == one.parts[part].bytes
    assert many.parts["norms"] == one.parts["norms"]
    assert "all-reduce" not in one.parts
    # Two of (8, 512) bf16 numbers a layer and one of the embedding, each sent 2 (n - 1) / n times.
    assert many.parts["all-reduce"].sent + many.parts["look-up"].sent == 5 * 8 * 512 * 2 * 2 * (devices - 1) / devices


def test_devices_beyond_the_kv_heads_hold_copies_of_them():
    four, eight = (decode_step(DENSE, 8, 1024, tensor_parallel=n).parts["attention"] for n in (4, 8))
    assert eight.cache == four.cache
    assert eight.flops == four.flops / 2


@given(tokens=st.integers(1, 64))
@settings(max_examples=15)
def test_experts_touched_are_those_of_a_simulation(tokens):
    moe, draws = MoEConfig(16, 2, 256), 2000
    order = np.random.default_rng(tokens).random((draws, tokens, 16)).argsort(axis=-1)[..., :2]
    touched = [len(np.unique(choices)) for choices in order]
    error = 5 * max(np.std(touched), 0.02) / draws**0.5
    assert experts_touched(moe, tokens) == pytest.approx(np.mean(touched), abs=error)


def test_one_token_reads_its_experts_and_many_read_all():
    per_expert = 3 * 512 * 256 * 2
    assert decode_step(SPARSE, 1, 10).parts["experts"].weights == pytest.approx(2 * per_expert)
    assert decode_step(SPARSE, 4096, 10).parts["experts"].weights == pytest.approx(16 * per_expert)
    assert decode_step(SPARSE, 64, 10).parts["experts"].flops == 64 * 2 * per_expert  # 2 experts, 2 FLOP, 2 bytes


def test_a_window_bounds_the_cache_that_a_layer_reads():
    short, long = (decode_step(DENSE, 1, context).parts["attention"].cache for context in (1000, 2000))
    assert long - short == 1000 * 2 * 4 * 64 * 2  # the full layer's keys and values alone


def test_narrow_formats_move_fewer_bytes():
    plain = decode_step(DENSE, 1, 4096)
    narrow = decode_step(DENSE, 1, 4096, Precision(weights="int4", cache="int8"))
    assert plain.parts["mlp"].weights / narrow.parts["mlp"].weights == pytest.approx(16 / 4.125)
    assert plain.parts["attention"].cache / narrow.parts["attention"].cache == pytest.approx(128 / (64 + 4))
    assert plain.parts["head"] == narrow.parts["head"]


def test_operands_of_8_bits_run_at_their_own_rate():
    half = prefill(DENSE, 4096, precision=Precision("fp8", "bf16", "fp8")).parts["mlp"]
    whole = prefill(DENSE, 4096).parts["mlp"]
    assert half.limit(DATASHEETS["h200"]) == pytest.approx(whole.limit(DATASHEETS["h200"]) / 2, rel=0.01)


def test_llama_3_8b_on_an_h200_has_the_limits_of_its_bytes_and_flops(published):
    config = published("llama-3-8b")
    # 15.0 GB of weights at 4.54 TB/s; 2 x 7.0e9 x 8192 and the causal half of 4 x 8192^2 x 4096 x 32 at 746 TFLOP/s.
    assert 1 / decode_step(config, 1, 256).limit(H200) == pytest.approx(303, rel=0.01)
    assert prefill(config, 8192).limit(H200) == pytest.approx(0.177, rel=0.02)


@pytest.mark.parametrize(("batch", "measured"), [(1, 227), (16, 3227), (64, 8810)])
def test_a_predicted_decode_step_is_near_the_measured_one(published, batch, measured):
    """Plain JAX with XLA's attention, whose scores lie in memory, in tokens/s: prompts of 128 tokens and 256 new ones,
    so 256 of context on average."""
    predicted = decode_step(published("llama-3-8b"), batch, 256, attention="materialized").predict(H200)
    assert batch / predicted == pytest.approx(measured, rel=0.2)


def test_decoding_turns_compute_bound_at_the_balance_of_the_machine(published):
    config = published("llama-3-8b")
    batch = compute_bound_batch(config, 1, H200)
    assert batch == pytest.approx(H200.balance(), rel=0.05)  # 2 FLOP a token on 2 bytes of weight
    for size, bound in ((batch - 1, "memory"), (batch, "compute")):
        assert decode_step(config, size, 1).bound(H200) == bound
    assert compute_bound_batch(config, 4096, H200) is None


def test_sums_of_few_bytes_are_quicker_than_other_messages(published):
    """Two all-reduces a layer and one of the embedding: each adds up what one token, or all of them, have."""
    config = published("llama-3-8b")
    token, wait = 2 * config.hidden_size, H200.messages
    assert wait.small % token == 0
    most = int(wait.small) // token
    for batch, each in ((1, wait.small_sum), (most, wait.small_sum), (most + 1, wait.latency)):
        works = [work for work in decode_step(config, batch, 128, tensor_parallel=2).parts.values() if work.messages]
        assert sum(work.waiting(H200) for work in works) == pytest.approx((2 * config.num_layers + 1) * each)
    assert Work(messages=3, sent=1.0).waiting(H200) == pytest.approx(3 * wait.latency)  # no sum


def test_a_cost_is_the_sum_of_its_parts_or_the_time_of_its_links():
    parts = {
        "arithmetic": Work(flops=746e12, weights=1.0),
        "traffic": Work(flops=1.0, cache=2 * 4.54e12),
        "links": Work(sent=2.5 * 450e9, messages=10, kernels=5),
    }
    cost = Cost(parts, tokens=1)
    assert [part.bound(H200) for part in parts.values()] == ["compute", "memory", "interconnect"]
    assert cost.limit(H200) == pytest.approx(1 + 2)  # under which what is sent is hidden
    assert cost.bound(H200) == "memory"
    assert cost.predict(H200) == pytest.approx(5.5 + 10 * H200.messages.latency + 5 * H200.overhead)
    assert cost.fraction(H200, 12.0) == pytest.approx(0.25)
    talking = Cost(parts | {"more links": Work(sent=450e9)}, tokens=1)
    assert talking.limit(H200) == pytest.approx(3.5)  # which is longer than what it hides
    assert talking.bound(H200) == "interconnect"
    assert talking.predict(H200) == pytest.approx(1 + cost.predict(H200))
    balanced = Cost({"both": Work(flops=3 * 746e12, weights=4 * 4.54e12)}, tokens=1)
    assert (balanced.limit(H200), balanced.predict(H200)) == pytest.approx((4, 5))
    with pytest.raises(ValueError, match=r"seconds is 0\.0; a measured time is above 0"):
        cost.fraction(H200, 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decode_step(DENSE, 0, 10), "batch is 0; it must be at least 1"),
        (lambda: decode_step(DENSE, 1, 2, queries=3), "context is 2; it must be at least 3"),
        (lambda: prefill(DENSE, 0), "tokens is 0; it must be at least 1"),
        (lambda: prefill(DENSE, 4, cached=-1), "cached is -1; it must be at least 0"),
        (
            lambda: decode_step(DENSE, 1, 10, tensor_parallel=3),
            "tensor_parallel is 3; it must divide vocab_size 512 and divide num_heads 8",
        ),
        (lambda: Precision(weights="bf15"), "weights is 'bf15'; expected one of fp32, bf16"),
        (lambda: Precision.all_in("bf16"), "dtype is 'bf16'; expected one of float32, bfloat16, float16"),
        (lambda: Precision.all_in("bfloat16", "fp8"), "cache_dtype is 'fp8'; expected one of .*, float8_e4m3fn"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

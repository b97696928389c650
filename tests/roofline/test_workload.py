"""The limit of a workload is that of its steps."""

import pytest

from jaxinfer.model.config import MoEConfig
from jaxinfer.roofline import MEASURED, Precision, decode_step, prefill, workload_limit
from jaxinfer.roofline.attention import AttentionModel
from tests.roofline.small import small, sparse, windowed

H200 = MEASURED["h200-measured"]
MODELS = [small(layers=windowed(None, 20)), small(num_kv_heads=8, layers=sparse(MoEConfig(16, 2, 256)))]


@pytest.mark.parametrize("config", MODELS)
@pytest.mark.parametrize("precision", [Precision(), Precision(cache="int8")])
@pytest.mark.parametrize("devices", [1, 2])
def test_equal_requests_take_one_prefill_and_a_step_for_each_further_token(config, precision, devices):
    steps = [prefill(config, 30, sequences=3, precision=precision, tensor_parallel=devices)]
    steps += [decode_step(config, 3, 30 + done, precision, devices) for done in range(1, 5)]
    expected = sum(step.limit(H200) for step in steps)
    assert workload_limit(config, H200, [(30, 5)] * 3, 0, precision, devices) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("config", MODELS)
def test_a_step_takes_those_that_still_go_on(config):
    one, two = (workload_limit(config, H200, [(30, 5), (30, output)]) for output in (1, 3))
    tail = sum(decode_step(config, 1, 30 + done).limit(H200) for done in range(1, 5))
    assert one == pytest.approx(prefill(config, 30, sequences=2).limit(H200) + tail, rel=1e-12)
    pairs = [decode_step(config, batch, 30 + done).limit(H200) for done in (1, 2) for batch in (2, 1)]
    assert two - one == pytest.approx(pairs[0] - pairs[1] + pairs[2] - pairs[3], rel=1e-9)


def test_each_has_its_own_context():
    config = MODELS[0]
    long, short = ([(tokens, output) for tokens in (60, 10)] for output in (2, 1))
    parts = [decode_step(config, 1, tokens + 1).parts["attention"].limit(H200) for tokens in (60, 10)]
    step = decode_step(config, 2, 1)
    rest = step.limit(H200) - step.parts["attention"].limit(H200)
    found = workload_limit(config, H200, long) - workload_limit(config, H200, short)
    assert found == pytest.approx(sum(parts) + rest, rel=1e-9)


def test_what_all_prompts_share_is_prefilled_once():
    config = MODELS[0]
    alone = workload_limit(config, H200, [(50, 1)])
    assert workload_limit(config, H200, [(50, 1)], shared=40) == pytest.approx(alone, rel=0.1)  # keys are read again
    sizes = [(500, 1)] * 8
    assert workload_limit(config, H200, sizes, shared=499) < 0.3 * workload_limit(config, H200, sizes)


@pytest.mark.parametrize("window", [None, 3, 12, 30])
@pytest.mark.parametrize("shared", [0, 7, 20])
def test_a_step_reads_each_key_once_however_many_see_it(window, shared):
    config, contexts = small(layers=windowed(window)), [shared + own for own in (1, 4, 4, 15)]
    seen = [range(max(0, context - (window or context)), context) for context in contexts]
    distinct = {(position, None if position < shared else nth) for nth, keys in enumerate(seen) for position in keys}
    model = AttentionModel(config, Precision(), 1, "flash")
    one = model.decoding([1])  # reads its key and writes it
    found = model.decoding(contexts, shared)
    assert found.cache == (len(distinct) + len(contexts)) * one.cache / 2
    assert found.flops == sum(map(len, seen)) * one.flops


def test_no_limit_of_shared_prompts_counts_their_keys_again():
    sizes = [(2048, 128)] * 64
    one = workload_limit(MODELS[1], H200, sizes[:1])
    assert one < workload_limit(MODELS[1], H200, sizes, shared=2000) < 0.5 * workload_limit(MODELS[1], H200, sizes)


def test_what_no_workload_is():
    for sizes in ([], [(0, 1)], [(3, 1), (1, 0)]):
        with pytest.raises(ValueError, match=r"sizes = .* at least one token in and one out"):
            workload_limit(MODELS[0], H200, sizes)
    with pytest.raises(ValueError, match=r"shared = 3 must be in 0..2: each prompt has a token of its own"):
        workload_limit(MODELS[0], H200, [(3, 1), (5, 1)], shared=3)

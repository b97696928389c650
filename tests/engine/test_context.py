"""An engine whose devices share every sequence gives what one device gives, token for token."""

from dataclasses import replace

import numpy as np
import pytest

from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.speculative import EarlyExit, PromptLookup
from jaxinfer.engine import Options
from jaxinfer.llm import LLM
from jaxinfer.outputs import RequestOutput
from tests.engine.tiny import ONE_LAYER, assert_clean, tiny_folder, write_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
BEGINNING = "def f(x):\n    return " * 2  # past the window of 8, and several pages
REQUESTS = [
    *[(BEGINNING + end, GREEDY) for end in ("x", "y + 1", "z")],
    ("0123456789" * 6, replace(GREEDY, max_tokens=30)),
    ("ab" * 20, replace(GREEDY, max_tokens=40)),
    ([5, 6, 7], replace(GREEDY, max_tokens=40)),
]
ALONE = Options(max_num_seqs=1, max_num_batched_tokens=64, page_size=32, steps_per_dispatch=4)
# Prompts in chunks, since they share the rows of a step, long programs, and pages that do not suffice for all.
FEW = Options(max_num_seqs=4, max_num_batched_tokens=64, page_size=4, num_pages=23, steps_per_dispatch=7)


def texts(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize(
    ("tensor", "speculation", "cache_dtype"), [(1, PromptLookup(3), "float32"), (2, None, "int8")]
)
def test_the_text_is_that_of_one_device(tensor, speculation, cache_dtype, folder, tmp_path, one_rectangle):
    if tensor > 1:
        folder = write_checkpoint(tmp_path / "one layer", ONE_LAYER)
    alone = LLM(folder, options=replace(ALONE, cache_dtype=cache_dtype))
    expected = texts([alone.generate([prompt], params)[0] for prompt, params in REQUESTS])
    options = replace(FEW, cache_dtype=cache_dtype, speculation=speculation, always_speculate=speculation is not None)
    shared = LLM(folder, tensor_parallel_size=tensor, context_parallel_size=2, options=options)
    for order in (1, -1):
        assert texts(shared.generate(*zip(*REQUESTS[::order], strict=True))) == expected[::order]
        assert_clean(shared)
    counters = shared.engine.metrics.counters
    assert counters.preemptions > 0
    assert counters.prefix_hits > 0
    if speculation is not None:
        assert sum(counters.accepted) > 0
        scored = replace(GREEDY, prompt_logprobs=0, max_tokens=1)
        own, theirs = (llm.generate([BEGINNING * 2], scored)[0].prompt_logprobs for llm in (shared, alone))
        here, there = ([entry.logprob for entry in scores[1:]] for scores in (own, theirs))
        np.testing.assert_allclose(here, there, rtol=0, atol=1e-5)


def test_what_is_not_built_is_refused(folder):
    with pytest.raises(ValueError, match="speculation = EarlyExit is not built for context_parallel_size = 2"):
        LLM(folder, context_parallel_size=2, options=replace(FEW, speculation=EarlyExit(2, 1)))


@pytest.mark.parametrize(("sizes", "told"), [
    ({"context_parallel_size": 3}, r"context_parallel_size = 3 must be a power of two in 1\.\.32"),
    ({"context_parallel_size": "2"}, r"context_parallel_size = '2' must be"),
    ({"context_parallel_size": 16}, r"context_parallel_size = 16 must be an integer in 1\.\.8, the devices here"),
    (
        {"context_parallel_size": 8, "tensor_parallel_size": 2},
        r"= 8 with tensor_parallel_size = 2 .* needs 16 devices.* in 1\.\.4",
    ),
])  # fmt: skip
def test_devices_that_cannot_share_sequences(sizes, told, folder):
    with pytest.raises(ValueError, match=told):
        LLM(folder, **sizes)

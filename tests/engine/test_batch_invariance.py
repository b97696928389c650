"""A request's text depends on the request alone: not on its neighbours, nor on how the engine cuts the work."""

import pytest

from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Options
from jaxinfer.llm import LLM
from jaxinfer.outputs import RequestOutput
from tests.engine.tiny import EOS, assert_clean, assert_warm, one_rectangle, tiny_folder, warm_llm

# Every way to choose and to end, at once. All of them need the whole sampler, which keeps the programs few.
REQUESTS = [
    ("def f(x):", SamplingParams(temperature=0.0, repetition_penalty=1.2, max_tokens=24)),
    ("the quick brown fox", SamplingParams(seed=1, top_k=30, top_p=0.9, min_p=0.01, max_tokens=20, min_tokens=20)),
    ("x" * 60, SamplingParams(seed=2, temperature=0.7, presence_penalty=0.5, frequency_penalty=0.3, n=2)),
    ("a", SamplingParams(seed=3, top_k=40, logit_bias={EOS: 4.0}, min_tokens=5, max_tokens=30)),
    ([5, 6, 7], SamplingParams(seed=4, top_p=0.8, stop_token_ids=list(range(10, 30)), ignore_eos=True)),
    ("what", SamplingParams(seed=5, min_p=0.05, stop=["e", "K?"], ignore_eos=True, max_tokens=40)),
    ("0123456789" * 6, SamplingParams(temperature=0.0, logit_bias={EOS: 6.0}, ignore_eos=True, max_tokens=9)),
]
# One request at a time, whole prompts, one step in a program, and a page for most of them.
ALONE = Options(max_num_seqs=1, max_num_batched_tokens=64, page_size=32, steps_per_dispatch=1)
# Two at a time, prompts in chunks, since they share the rows of a step, long programs, and pages that do not suffice
# for two of the longest.
FEW = Options(max_num_seqs=2, max_num_batched_tokens=64, page_size=16, num_pages=9, steps_per_dispatch=7)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[RequestOutput]:
    """What every request gives with an engine to itself."""
    llm = LLM(tiny_folder(tmp_path_factory.getbasetemp()), options=ALONE)
    return [llm.generate([prompt], params)[0] for prompt, params in REQUESTS]


def test_the_requests_end_in_every_way(alone):
    """Else the tests below would show less than they claim."""
    outputs = [output for request in alone for output in request.outputs]
    ends = {(output.finish_reason, type(output.stop_reason)) for output in outputs}
    assert ends == {("length", type(None)), ("stop", type(None)), ("stop", int), ("stop", str)}
    assert len({output.text for output in outputs}) == len(outputs) == len(REQUESTS) + 1
    assert len(alone[3].outputs[0].token_ids) > 5


def test_the_batch_does_not_matter(alone, tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    four_at_a_time, two_at_a_time = warm_llm(root), LLM(tiny_folder(root), options=FEW)
    with one_rectangle():
        for llm in (four_at_a_time, two_at_a_time):
            assert llm.generate(*zip(*REQUESTS, strict=True)) == alone
            assert_clean(llm)
            assert llm.generate(*zip(*REQUESTS[::-1], strict=True)) == alone[::-1]
            assert_clean(llm)
    assert_warm(four_at_a_time)

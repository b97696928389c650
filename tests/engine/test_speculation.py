"""An engine that speculates gives what a plain one gives, for every request and in any company."""

from dataclasses import replace

import pytest

from jaxinfer import SamplingParams
from jaxinfer.decode.speculative import PromptLookup
from jaxinfer.engine.options import IN_FLIGHT
from jaxinfer.engine.request import TokenLogprobs
from jaxinfer.llm import LLM
from tests.engine.tiny import OPTIONS, assert_warm, tiny_folder, warm_llm

PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=1),
    SamplingParams(temperature=0.7, max_tokens=60, seed=3, logprobs=2, ignore_eos=True),
    SamplingParams(temperature=0.3, top_p=0.9, top_k=20, presence_penalty=0.3, max_tokens=50, seed=4, min_tokens=9),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.2, max_tokens=33, ignore_eos=True),
    SamplingParams(temperature=0.5, min_p=0.1, max_tokens=70, seed=5, stop=["aa", "b "], n=2),
    SamplingParams(temperature=0.0, max_tokens=57, stop_token_ids=[70, 71, 72], ignore_eos=True),
]
PROMPTS = [
    "ab" * 9, "x", "the cat and the cat and", "z" * 33, "one two three one two", "ab" * 9 + "c", "import os\nimport"
]  # fmt: skip


@pytest.fixture(scope="module")
def speculative(tmp_path_factory) -> LLM:
    """Its pool is too small for four long sequences: some are preempted. One layer has a window."""
    options = replace(OPTIONS, speculation=PromptLookup(3, 3), num_pages=29)
    return LLM(tiny_folder(tmp_path_factory.getbasetemp()), options=options, warm_up=True)


def answers(llm: LLM, prompts: list[str], params: list[SamplingParams]) -> list[tuple]:
    outputs = llm.generate(prompts, params)
    return [
        (one.token_ids, one.text, one.finish_reason, [likeliest(entry) for entry in one.logprobs or ()])
        for output in outputs
        for one in output.outputs
    ]


def likeliest(entry: TokenLogprobs) -> list[int]:
    return [token for token, _ in entry.top]


def test_every_request_gets_what_plain_decoding_gives_it(tmp_path_factory, speculative):
    plain = warm_llm(tmp_path_factory.getbasetemp())
    assert answers(speculative, PROMPTS, PARAMS) == answers(plain, PROMPTS, PARAMS)
    counters = speculative.engine.counters
    assert counters.preemptions > 0
    assert counters.drafts > 0
    assert len(counters.accepted) == 3
    assert counters.drafts >= counters.accepted[0] >= counters.accepted[1] >= counters.accepted[2] > 0
    assert 1 < counters.tokens_per_draft < 4
    assert_warm(speculative)


def test_what_repeats_takes_fewer_programs(speculative):
    """A loop of the tiny model's, whose every proposal is right in the end."""
    counters = speculative.engine.counters
    before, accepted = counters.drafts, sum(counters.accepted)
    (output,) = speculative.generate(["ab" * 9], SamplingParams(temperature=0.0, max_tokens=70, ignore_eos=True))
    drafts, accepted = counters.drafts - before, sum(counters.accepted) - accepted
    assert len(output.outputs[0].token_ids) == 70
    assert 1 + drafts + accepted >= 70  # the first token is the prompt's; the last step may propose beyond the end
    assert accepted > drafts


def test_texts_are_shared_and_cut_as_ever(tmp_path_factory, speculative):
    """A prompt that was prefilled in chunks, and one that begins like it."""
    plain, params = warm_llm(tmp_path_factory.getbasetemp()), SamplingParams(temperature=0.0, max_tokens=12)
    prompts = ["abcabd" * 12, "abcabd" * 11 + "xyz"]
    for prompt in prompts:
        assert answers(speculative, [prompt], [params]) == answers(plain, [prompt], [params])
    assert speculative.engine.metrics.prefix_hit_rate > 0
    assert_warm(speculative)


def test_pages_are_planned_for_all_that_may_come():
    """A program that is read late may bring anything from a token of each step to all that were proposed."""
    options = replace(OPTIONS, steps_per_dispatch=3, speculation=PromptLookup(2))
    assert (OPTIONS.most_ahead, options.most_ahead) == (OPTIONS.steps_per_dispatch, 3 * (1 + 2 * IN_FLIGHT))


def test_devices_that_share_the_model_speculate_alike(tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    shared = LLM(
        tiny_folder(root),
        tensor_parallel_size=2,
        options=replace(OPTIONS, max_num_seqs=2, speculation=PromptLookup(3)),
    )
    asked = PROMPTS[:1], [replace(PARAMS[2], max_tokens=30)]
    assert answers(shared, *asked) == answers(warm_llm(root), *asked)
    assert shared.engine.counters.drafts > 0

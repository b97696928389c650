"""An engine that speculates gives what a plain one gives, for every request and in any company."""

from dataclasses import replace
from pathlib import Path

import pytest

from jaxinfer import SamplingParams
from jaxinfer.decode.speculative import DraftModel, EarlyExit, PromptLookup, Speculation
from jaxinfer.engine import engine, warm_up
from jaxinfer.engine.gate import Gate
from jaxinfer.engine.options import IN_FLIGHT
from jaxinfer.engine.request import TokenLogprobs
from jaxinfer.engine.warm_up import WARM
from jaxinfer.llm import LLM
from tests.engine.tiny import (
    CONFIG,
    OPTIONS,
    assert_clean,
    assert_warm,
    drawing_alike,
    one_rectangle,
    tiny_folder,
    warm_llm,
    write_checkpoint,
)

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


# Of one kind of sampling. Loops: of 1 and 4 slots, each with proposals and without.
TRACES = {"admit": 2, "release": 1, "extend": 1, "step": 2 + 1, "mask": 1, "sample": 1, "loop": 2 * 2}


@pytest.fixture(scope="module")
def speculative(tmp_path_factory) -> LLM:
    """Its pool is too small for four long sequences: some are preempted. One layer has a window. To compile less, one
    kind of sampling serves all."""
    options = replace(OPTIONS, speculation=PromptLookup(3, 3), num_pages=29, always_speculate=True)
    with pytest.MonkeyPatch.context() as patch:
        for module in (engine, warm_up):
            patch.setattr(module, "WARM", WARM[-1:])
        return LLM(tiny_folder(tmp_path_factory.getbasetemp()), options=options, warm_up=True)


class Alternating(Gate):
    """Lets every other program propose."""

    asked = 0

    def drafts(self, decoding):
        self.asked += 1
        return self._depth * (self.asked % 2)


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
    assert_warm(speculative, TRACES)


def test_a_gate_changes_no_output_and_compiles_nothing(tmp_path_factory, speculative, monkeypatch):
    scheduler, counters = speculative.engine.scheduler, speculative.engine.counters
    gate = Alternating(speculative.engine.layout)
    monkeypatch.setattr(speculative.engine, "gate", gate)
    monkeypatch.setattr(scheduler, "gate", gate)
    plans, schedule = [], scheduler.schedule
    monkeypatch.setattr(scheduler, "schedule", lambda: plans.append(schedule()) or plans[-1])
    before, accepted, told = counters.drafts, sum(counters.accepted), counters.output_tokens
    plain = answers(warm_llm(tmp_path_factory.getbasetemp()), PROMPTS, PARAMS)
    assert answers(speculative, PROMPTS, PARAMS) == plain
    decoded = [plan.drafts for plan in plans if plan.decoding and not plan.chunks and plan.steps > 1]
    assert decoded == [3 * ((number + 1) % 2) for number in range(len(decoded))]
    assert len(decoded) == gate.asked > 10
    drafts, accepted = counters.drafts - before, sum(counters.accepted) - accepted
    assert 0 < drafts < counters.output_tokens - told - accepted  # some draws had no proposals
    assert_warm(speculative, TRACES)


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
    assert_warm(speculative, TRACES)


def test_pages_are_planned_for_all_that_may_come():
    """A program that is read late may bring anything from a token of each step to all that were proposed."""
    options = replace(OPTIONS, steps_per_dispatch=3, speculation=PromptLookup(2))
    assert (OPTIONS.most_ahead, options.most_ahead) == (OPTIONS.steps_per_dispatch, 3 * (1 + 2 * IN_FLIGHT))


def test_devices_that_share_the_model_speculate_alike(tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    shared = LLM(
        tiny_folder(root),
        tensor_parallel_size=2,
        options=replace(OPTIONS, max_num_seqs=2, speculation=PromptLookup(3), always_speculate=True),
    )
    asked = PROMPTS[:1], [replace(PARAMS[2], max_tokens=30)]
    assert answers(shared, *asked) == answers(warm_llm(root), *asked)
    assert shared.engine.counters.drafts > 0


# --- drafts


def drafted(root: Path, method: Speculation, **sizes) -> LLM:
    options = replace(OPTIONS, speculation=method, always_speculate=True, **sizes)
    return drawing_alike(LLM(tiny_folder(root), options=options))


@pytest.fixture(scope="module")
def small_draft(tmp_path_factory) -> Path:
    """A model of one layer and other heads, all of whose attention is in the window."""
    config = {**CONFIG, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 1}
    return write_checkpoint(
        tmp_path_factory.mktemp("draft") / "small", {**config, "layer_types": ["sliding_attention"]}
    )


@pytest.mark.parametrize("method", ["draft", "early-exit"])
def test_coupled_drafts_never_change_an_output(tmp_path_factory, small_draft, method):
    """Greedy and sampled, preempted and shared, beside prompts that come in chunks."""
    root = tmp_path_factory.getbasetemp()
    methods = {"draft": DraftModel(small_draft, 2, coupled=True), "early-exit": EarlyExit(2, 1, coupled=True)}
    llm = drafted(root, methods[method], num_pages=29)
    (layers,) = {len(one.config.layers) for one in llm.engine.layout.speculation.passes(llm.engine.model)}
    assert layers == 1
    asked = PROMPTS * 2, PARAMS * 2
    expected = answers(warm_llm(root), *asked)
    with one_rectangle():
        assert answers(llm, *asked) == expected
    assert llm.engine.counters.preemptions > 0
    assert llm.engine.counters.accepted[0] > 0
    assert_clean(llm)


def test_a_draft_that_is_the_model_is_always_right(tmp_path_factory):
    """Its keys and values are there whenever it drafts: of prompts in chunks, of shared pages, of accepted tokens."""
    root = tmp_path_factory.getbasetemp()
    llm = drafted(root, DraftModel(tiny_folder(root), 3))
    passes = llm.engine.layout.speculation.passes(llm.engine.model)
    assert [(one.config, one.queries) for one in passes] == [(llm.engine.model.config, count) for count in (2, 1, 1)]
    params = SamplingParams(temperature=0.7, max_tokens=13, seed=1, ignore_eos=True)
    for prompt in ("ab" * 9, "abcabd" * 12, "abcabd" * 11 + "xyz"):
        counters = llm.engine.counters
        before = counters.drafts, counters.accepted
        llm.generate([prompt], params)
        accepted = [new - old for new, old in zip(counters.accepted, before[1] or (0, 0, 0), strict=True)]
        # The first token is of the prompt; then four come at once, three times.
        assert [counters.drafts - before[0], *accepted] == [3, 3, 3, 3]
    assert llm.engine.metrics.prefix_hit_rate > 0


def test_what_does_not_go_with_the_model_is_refused(tmp_path_factory, small_draft):
    root = tmp_path_factory.getbasetemp()
    other = write_checkpoint(tmp_path_factory.mktemp("wide") / "wide", {**CONFIG, "vocab_size": 105})
    with pytest.raises(ValueError, match="has a vocabulary of 105 tokens; it must have the model's, 104"):
        drafted(root, DraftModel(other))
    with pytest.raises(ValueError, match="exit_layers = 2 must be fewer than the model's 2 layers"):
        drafted(root, EarlyExit(exit_layers=2))
    with pytest.raises(ValueError, match="nowhere' is no folder"):
        drafted(root, DraftModel("./nowhere"))
    with pytest.raises(ValueError, match="num_speculative_tokens = 0 must be"):
        DraftModel(small_draft, 0)
    with pytest.raises(ValueError, match=r"exit_layers = 0 must be an integer, at least 1"):
        EarlyExit(exit_layers=0)
    tokenizer = small_draft / "tokenizer.json"
    whole = tokenizer.read_text()
    tokenizer.write_text(whole.replace('"~"', '"ÿ"'))
    with pytest.raises(ValueError, match=r"differs from that of .* in 2 tokens, such as '~'; it must be the same"):
        drafted(root, DraftModel(small_draft))
    tokenizer.write_text(whole)

"""An engine that speculates gives what a plain one gives, for every request and in any company."""

import functools
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from jaxinfer import SamplingParams, llm
from jaxinfer.decode.speculative import DraftModel, EarlyExit, PromptLookup, Speculation
from jaxinfer.engine import engine, memory, warm_up
from jaxinfer.engine.constraints import Constraints
from jaxinfer.engine.gate import Gate
from jaxinfer.engine.options import IN_FLIGHT
from jaxinfer.engine.request import TokenLogprobs
from jaxinfer.engine.warm_up import WARM
from jaxinfer.llm import LLM
from jaxinfer.model import read_config
from jaxinfer.parallel import collectives
from tests.engine.tiny import (
    CHARACTERS,
    CONFIG,
    EOS,
    ONE_LAYER,
    OPTIONS,
    assert_clean,
    assert_warm,
    drawing_alike,
    one_rectangle,
    tiny_folder,
    warm_llm,
    write_checkpoint,
)
from tests.test_structured import DIGITS, GROWING, SCHEMA, ask, break_digits

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


# Requests with constraints and without. One has an end in its prompt, which is proposed; the grammar of one fails.
CONSTRAINED_PROMPTS: list[str | list[int]] = [
    "ab" * 9, "the cat and the cat and", '{"name": "x", "on": true}', "z" * 33, [1, 2, EOS, 1, 2, EOS, 1], "aaaa", "x"
]  # fmt: skip
CONSTRAINED = [
    ask(max_tokens=60, temperature=0.0, regex="(ab|ac){5,9}"),
    SamplingParams(temperature=0.7, max_tokens=60, seed=3, logprobs=2, ignore_eos=True),
    ask(4, 70, json=SCHEMA, logprobs=2, n=2),
    SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    ask(5, temperature=0.0, regex='("#)*', max_tokens=30),
    ask(6, regex=GROWING),
    ask(7, regex="[a-z]{9,30}", presence_penalty=0.3, top_k=9, stop=["aa", "q"], n=2),
]

# Of one kind of sampling. Loops: of 1 and 4 slots, each with proposals and without; and the parts of a step whose
# proposals the host checks.
TRACES = {
    "admit": 2, "release": 1, "extend": 1, "step": 2 + 1, "mask": 1, "sample": 1, "finish": 1, "score": 1,
    "loop": 2 * 2, "propose": 2, "drafted": 2, "verify": 2,
}  # fmt: skip


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


def answers(llm: LLM, prompts: list[str] | list[str | list[int]], params: list[SamplingParams]) -> list[tuple]:
    outputs = llm.generate(prompts, params)
    return [
        (one.token_ids, one.text, one.finish_reason, one.problem, [likeliest(entry) for entry in one.logprobs or ()])
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


def test_constrained_requests_get_what_plain_decoding_gives_them(tmp_path_factory, speculative):
    """Beside others. Some end with what was proposed, or where an end was, and one because its grammar fails."""
    plain, counters = warm_llm(tmp_path_factory.getbasetemp()), speculative.engine.counters
    drafts, preemptions = counters.drafts, counters.preemptions
    asked = CONSTRAINED_PROMPTS * 2, CONSTRAINED * 2
    expected = answers(plain, *asked)
    assert answers(speculative, *asked) == expected
    assert {reason for _, _, reason, _, _ in expected} == {"stop", "length", "constraint"}
    assert counters.drafts > drafts
    assert counters.preemptions > preemptions
    assert_warm(speculative, TRACES)


def test_a_proposal_that_cannot_be_checked_ends_its_own_request_alone(speculative, monkeypatch):
    """Between the forward pass and the draws of a step that others have a part in."""
    prompts = ["121212121212", "abcabcabcab", "the cat and the cat and"]
    params = [ask(temperature=0.0, regex=DIGITS), ask(max_tokens=30, temperature=0.0, regex="(cab)*"), PARAMS[0]]
    _, *expected = answers(speculative, prompts, params)
    drafts = speculative.engine.counters.drafts
    with monkeypatch.context() as patched:
        break_digits(patched, speculative, "mask", 3)
        (_, text, reason, _, _), *others = answers(speculative, prompts, params)
    assert others == expected
    assert reason == "error"
    assert text.isdigit()
    assert speculative.engine.counters.drafts > drafts
    assert_warm(speculative, TRACES)


def test_what_a_constraint_lets_copy_takes_fewer_steps(speculative):
    """Three proposals of four tokens are right, until the end, which none of them is."""
    counters = speculative.engine.counters
    before = counters.drafts, *counters.accepted
    params = ask(max_tokens=70, temperature=0.0, regex="(the cat and ){5}")
    (output,) = speculative.generate(["the cat and the cat and "], params)
    assert output.outputs[0].text == "the cat and " * 5
    assert output.outputs[0].finish_reason == "stop"
    taken = [new - old for new, old in zip((counters.drafts, *counters.accepted), before, strict=True)]
    assert taken == [15] * 4  # the first token is the prompt's, then come 59 and the end
    assert_warm(speculative, TRACES)


def test_proposals_are_checked_while_the_forward_pass_is_on_its_way(speculative, monkeypatch):
    order, programs = [], speculative.engine.runner.programs

    def logged(owner, name):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **named: order.append(name) or call(*given, **named))

    for name in ("_step", "_propose", "_drafted", "_verify", "_loop"):
        logged(programs, name)
    logged(Constraints, "masks")
    speculative.generate(["abcabcabcab"], ask(max_tokens=20, temperature=0.0, regex="(cab){3}"))
    checked = ["_propose", "_drafted", "masks", "_verify"]
    assert order == ["_step", "masks", *checked * 3, *checked]  # the last was on its way when the end was read
    assert_warm(speculative, TRACES)


def test_programs_that_the_host_checks_are_only_made_where_it_may(speculative):
    """For each rectangle its proposals, its forward pass, and draws of each kind."""
    with_masks, without = (
        {program.name for program in warm_up.warm_programs(speculative.engine.runner, 64, masked)}
        for masked in (True, False)
    )
    named = {name for name in with_masks if name.startswith(tuple(warm_up.PARTS.values()))}
    assert len(named) == 2 * (1 + 1 + len(WARM))
    assert with_masks - named - without == {"8 rows without prompts", "masks"}
    assert without < with_masks - named


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


@pytest.mark.parametrize("method", ["lookup", "draft"])
def test_devices_that_share_the_model_speculate_alike(tmp_path_factory, monkeypatch, method):
    """And that share the tokens of every prefill."""
    root = tmp_path_factory.getbasetemp()
    monkeypatch.setattr(collectives, "MANY_TOKENS", OPTIONS.max_num_batched_tokens)
    speculation = PromptLookup(3) if method == "lookup" else DraftModel(tiny_folder(root), 2)
    options = replace(OPTIONS, max_num_seqs=2, speculation=speculation, always_speculate=True)
    shared = LLM(tiny_folder(root), tensor_parallel_size=2, options=options)
    asked = {
        "lookup": [(PROMPTS[0], replace(PARAMS[2], max_tokens=30)), ("abcabcabcab", ask(3, 20, regex="(ca?b){4}"))],
        "draft": [(PROMPTS[3], replace(PARAMS[0], max_tokens=30))],
    }
    for prompt, params in asked[method]:
        drafts = shared.engine.counters.drafts
        assert answers(shared, [prompt], [params]) == answers(warm_llm(root), [prompt], [params])
        assert shared.engine.counters.drafts > drafts


def assert_constrained_alike(llm: LLM, plain: LLM) -> None:
    drafts = llm.engine.counters.drafts
    assert answers(llm, CONSTRAINED_PROMPTS, CONSTRAINED) == answers(plain, CONSTRAINED_PROMPTS, CONSTRAINED)
    assert llm.engine.counters.drafts > drafts
    assert llm.engine.runner.programs.traces["verify"] > 0


# --- drafts


@functools.cache
def drafted(root: Path, method: Speculation, **sizes) -> LLM:
    """One engine for all tests that ask for it."""
    return LLM(tiny_folder(root), options=replace(OPTIONS, speculation=method, **sizes))


@functools.cache
def small_draft(root: Path) -> Path:
    """A model of one layer and other heads, all of whose attention is in the window."""
    config = {**CONFIG, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 1}
    return write_checkpoint(root / "small", {**config, "layer_types": ["sliding_attention"]})


def coupled(root: Path, method: str) -> LLM:
    """Any number of whose proposals may be right."""
    methods = {"draft": DraftModel(small_draft(root), 2, coupled=True), "early-exit": EarlyExit(2, 1, coupled=True)}
    return drawing_alike(drafted(root, methods[method], num_pages=29, adaptive_speculation=True))


def always_right(root: Path) -> LLM:
    """Its draft is the model."""
    return drafted(root, DraftModel(tiny_folder(root), 3), adaptive_speculation=True)


def propose_all(llm: LLM) -> None:
    llm.engine.gate = llm.engine.scheduler.gate = Gate(llm.engine.layout)


@pytest.mark.parametrize("method", ["draft", "early-exit"])
def test_coupled_drafts_never_change_an_output(tmp_path_factory, method):
    """Greedy and sampled, preempted and shared, beside prompts that come in chunks."""
    root = tmp_path_factory.getbasetemp()
    llm = coupled(root, method)
    propose_all(llm)
    (layers,) = {len(one.config.layers) for one in llm.engine.layout.speculation.passes(llm.engine.model)}
    assert layers == 1
    asked = PROMPTS * 2, PARAMS * 2
    expected = answers(warm_llm(root), *asked)
    with one_rectangle():
        assert answers(llm, *asked) == expected
        assert_constrained_alike(llm, warm_llm(root))
    assert llm.engine.counters.preemptions > 0
    assert llm.engine.counters.accepted[0] > 0
    assert_clean(llm)


def test_constrained_outputs_have_the_distribution_of_the_model(tmp_path_factory):
    """What a draft drew without a constraint is accepted as the model would draw it with one. A bias lets it propose
    little else than two letters that may come, and one that may not."""
    root, count, temperature = tmp_path_factory.getbasetemp(), 600, 0.25
    texts = ["".join(text) for text in product("ab", repeat=3)]
    scored = warm_llm(root).generate(["b" + text for text in texts], SamplingParams(max_tokens=1, prompt_logprobs=1))
    # The probability of each token of each text, by its three letters, then of the two that are allowed.
    logp_222T = np.array([[entry.logprob for entry in one.prompt_logprobs[-3:]] for one in scored]).reshape(2, 2, 2, 3)
    p_222T = np.exp(logp_222T / temperature)
    bound_222T = [p_222T[..., place] / p_222T[..., place].sum(place, keepdims=True) for place in range(3)]
    expected = count * np.prod(bound_222T, axis=0).ravel()
    many = {"max_num_seqs": 32, "num_pages": 129}  # so that few steps serve all
    llm = drawing_alike(drafted(root, DraftModel(small_draft(root), 2), always_speculate=True, **many))
    bias = {CHARACTERS.index(letter): 20.0 for letter in "abc"}
    params = [ask(seed, regex="[ab]{3}", temperature=temperature, logit_bias=bias) for seed in range(count)]
    with one_rectangle():
        outputs = llm.generate(["b"] * count, params)
    found = Counter(output.outputs[0].text for output in outputs)
    assert scipy.stats.chisquare([found[text] for text in texts], expected).pvalue > 0.01
    counters = llm.engine.counters
    assert 0.2 < counters.accepted_by_position[0] < 0.8


def test_a_draft_that_is_the_model_is_always_right(tmp_path_factory):
    """Its keys and values are there whenever it drafts: of prompts in chunks, of shared pages, of accepted tokens."""
    root = tmp_path_factory.getbasetemp()
    llm = always_right(root)
    propose_all(llm)
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


def test_a_draft_beside_windows_alone_sees_what_is_in_them(tmp_path, tmp_path_factory):
    """Also in a layer that sees all of a text by itself: the model keeps no more, and drafts change no output."""
    target = write_checkpoint(tmp_path / "target", CONFIG | {"layer_types": ["sliding_attention"] * 2})
    draft = tiny_folder(tmp_path_factory.getbasetemp())
    one = LLM(target, options=replace(OPTIONS, speculation=DraftModel(draft)))
    own, method = read_config(draft), one.engine.layout.speculation
    assert isinstance(method, DraftModel)
    assert (own.windows, method.model.config.windows) == ((8, None), (8,))
    narrow = write_checkpoint(
        tmp_path / "narrow", ONE_LAYER | {"layer_types": ["sliding_attention"], "sliding_window": 1}
    )
    with pytest.raises(ValueError, match="writes the keys of two tokens in a step; the model keeps only one"):
        LLM(narrow, options=replace(OPTIONS, speculation=DraftModel(draft)))
    assert [own.within(windows).windows for windows in ((5,), (9, 3), (None, 3))] == [(5,), (8, 9), (8, None)]


def test_what_does_not_go_with_the_model_is_refused(tmp_path_factory, monkeypatch):
    """Before any weights are read, the draft's or the model's."""
    root = tmp_path_factory.getbasetemp()
    draft = small_draft(root)
    monkeypatch.setattr(llm.checkpoint, "load", lambda *given: pytest.fail("weights were read"))
    other = write_checkpoint(tmp_path_factory.mktemp("wide") / "wide", {**CONFIG, "vocab_size": 105})
    with pytest.raises(ValueError, match="has a vocabulary of 105 tokens; it must have the model's, 104"):
        drafted(root, DraftModel(other))
    with pytest.raises(ValueError, match="exit_layers = 2 must be fewer than the model's 2 layers"):
        drafted(root, EarlyExit(exit_layers=2))
    with pytest.raises(ValueError, match="nowhere' is no folder"):
        drafted(root, DraftModel("./nowhere"))
    with pytest.raises(ValueError, match="num_speculative_tokens = 0 must be"):
        DraftModel(draft, 0)
    with pytest.raises(ValueError, match=r"exit_layers = 0 must be an integer, at least 1"):
        EarlyExit(exit_layers=0)
    monkeypatch.setattr(memory, "memory_of", lambda device: 100_000)  # the model fits, by itself
    with pytest.raises(memory.NoRoomError, match=r"the draft beside it .* a smaller draft may fit, or more devices"):
        drafted(root, DraftModel(draft))
    tokenizer = draft / "tokenizer.json"
    whole = tokenizer.read_text()
    tokenizer.write_text(whole.replace('"~"', '"ÿ"'))
    with pytest.raises(ValueError, match=r"differs from that of .* in 2 tokens, such as '~'; it must be the same"):
        drafted(root, DraftModel(draft))
    tokenizer.write_text(whole)

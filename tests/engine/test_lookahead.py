"""An engine that looks ahead: what it writes is plain decoding's, and what it foresees is what a model must foresee
whose next token follows from the one before."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.speculative.comparing import Shut
from jaxinfer import SamplingParams
from jaxinfer.decode.speculative import Lookahead
from jaxinfer.llm import LLM
from tests.decode.test_lookahead import ByHand
from tests.engine.test_medusa import FOLLOWS, OPTIONS, write
from tests.engine.test_speculation import CONSTRAINED, CONSTRAINED_PROMPTS, Alternating, answers
from tests.engine.tiny import assert_clean, drawing_alike, tiny_folder

METHOD = Lookahead(window_size=4, ngram_size=4, max_verification_set_size=2, pool_size=50)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.getbasetemp())


def test_an_engine_foresees_what_is_foreseen_by_hand(tmp_path, tiny):
    """After prompts, in chunks and shared, and between steps that propose nothing: then the window is older. On two
    devices."""
    folder, options = write(tmp_path / "table", tiny, rest=0.0), replace(OPTIONS, max_num_seqs=1, speculation=METHOD)
    llm = LLM(folder, tensor_parallel_size=2, options=options)
    llm.engine.gate = llm.engine.scheduler.gate = Alternating(llm.engine.layout)
    params, depth = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=36), llm.engine.layout.depth
    for prompt in ("ab" * 9, "abcabd" * 9, "abcabd" * 8 + "xyz"):
        drafts, before = llm.engine.counters.drafts, llm.engine.counters.accepted or (0,) * depth
        llm.engine.gate.asked = 0
        (output,) = llm.generate([prompt], params)
        tokens = [*output.prompt_token_ids[-1:], *output.outputs[0].token_ids]
        assert tokens[1:] == FOLLOWS[tokens[:-1]].tolist()
        accepted = [new - old for new, old in zip(llm.engine.counters.accepted, before, strict=True)]
        assert [llm.engine.counters.drafts - drafts, *accepted] == by_hand(output.prompt_token_ids, tokens[1:], depth)
        assert sum(accepted) > 0
    assert llm.engine.metrics.prefix_hit_rate > 0


def by_hand(prompt: list[int], output: list[int], depth: int) -> list[int]:
    """Steps that propose, and those in which the first token was right, the first two, and so on."""
    hand, to_come, counts, step = ByHand(METHOD, [*prompt, output[0]]), output[1:], [0] * (1 + depth), 0
    while to_come:
        proposes = step // OPTIONS.steps_per_dispatch % 2 == 0
        taken = min(1 + (hand.agreed(to_come) if proposes else 0), len(to_come))
        brought, to_come = to_come[:taken], to_come[taken:]
        if proposes:
            window, _ = hand.proposed()
            hand.step(FOLLOWS[window].tolist(), brought)
            counts = [count + (place < taken) for place, count in enumerate(counts)]
        else:
            hand.text += brought
        step += 1
    return counts


def test_looking_ahead_never_changes_an_output(one_rectangle, tmp_path, tiny):
    """Greedy and sampled, preempted and shared: where the rest of the model has a say, too. Also where some programs
    propose nothing."""
    folder = write(tmp_path / "model", tiny, rest=0.1)
    llm = drawing_alike(LLM(folder, options=replace(OPTIONS, num_pages=22, speculation=METHOD)))
    prompts = ["ab" * 9, "x", "0123456789" * 6, "z" * 33, "ab" * 9 + "c", "import os\nimport"]
    params = [
        SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=1.0, max_tokens=41, seed=1, ignore_eos=True),
        SamplingParams(temperature=0.7, max_tokens=20, seed=2, presence_penalty=0.4, logprobs=1),
        SamplingParams(temperature=0.9, max_tokens=37, seed=3, stop_token_ids=[70, 71, 72]),
        SamplingParams(temperature=0.0, repetition_penalty=1.2, max_tokens=30, ignore_eos=True),
        SamplingParams(temperature=1.0, max_tokens=33, seed=5, ignore_eos=True),
    ]
    found, counters = answers(llm, prompts, params), llm.engine.counters
    constrained = answers(llm, CONSTRAINED_PROMPTS, CONSTRAINED)
    assert llm.engine.runner.programs.traces["verify"] > 0
    assert counters.preemptions > 0
    assert counters.tokens_per_draft > 1.1
    for gate in (Alternating(llm.engine.layout), Shut(llm.engine.layout)):
        llm.engine.gate = llm.engine.scheduler.gate = gate
        drafts = counters.drafts
        assert answers(llm, prompts, params) == found
        assert answers(llm, CONSTRAINED_PROMPTS, CONSTRAINED) == constrained
        assert (counters.drafts == drafts) == isinstance(gate, Shut)
    assert_clean(llm)

"""A draft learns from the model that it drafts for, while it serves."""

from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxinfer import SamplingParams
from jaxinfer.decode.speculative import DraftModel, PromptLookup
from jaxinfer.engine.commit import corrections
from jaxinfer.engine.memory import NoRoomError
from jaxinfer.llm import LLM
from jaxinfer.training.online import OnlineDraft
from tests.engine.test_warm_up import counted
from tests.engine.tiny import ONE_LAYER, OPTIONS, assert_clean, one_rectangle, write_checkpoint

PARAMS = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
BEFORE, AFTER = (["ab" * 9, "the cat", "z" * 30, "1234"], ["import os\n", "QRST", "{[()]}", "~~~x~~~"])


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> Iterator[LLM]:
    root = tmp_path_factory.mktemp("online")
    small = write_checkpoint(root / "small", ONE_LAYER)
    options = replace(OPTIONS, speculation=DraftModel(small, 3), always_speculate=True)
    with one_rectangle():
        yield LLM(write_checkpoint(root / "model", ONE_LAYER | {"intermediate_size": 64}), options=options)


def acceptance(llm: LLM, prompts: list[str], learner: OnlineDraft | None = None, rounds: int = 1) -> float:
    """Of the first proposals; where there is a learner, it sees what comes."""
    counters = llm.engine.counters
    drafts, right = counters.drafts, counters.accepted[0] if counters.accepted else 0
    llm.watch = learner.see if learner is not None else None
    for _ in range(rounds):
        llm.generate(prompts, PARAMS)
    llm.watch = None
    return (counters.accepted[0] - right) / (counters.drafts - drafts)


def test_acceptance_follows_the_traffic(llm):
    """It rises with what is learned, falls when other texts come, and recovers; outputs stay what they are."""
    written = [output.outputs[0].token_ids for output in llm.generate(BEFORE, PARAMS)]
    learner = OnlineDraft(llm.engine, learning_rate=1e-2, interval=1, batch=4, row=64)
    raw = acceptance(llm, BEFORE)
    with counted("compile") as compilations:
        acceptance(llm, BEFORE, learner, rounds=16)
    learned, other = acceptance(llm, BEFORE), acceptance(llm, AFTER)
    traces = dict(llm.engine.runner.programs.traces)
    acceptance(llm, AFTER, learner, rounds=16)
    recovered = acceptance(llm, AFTER)
    assert not compilations  # nobody waits for it
    assert learned > raw + 0.3
    assert other < learned - 0.3
    assert recovered > other + 0.3
    assert llm.engine.counters.draft_updates > 5
    assert [output.outputs[0].token_ids for output in llm.generate(BEFORE, PARAMS)] == written
    assert dict(llm.engine.runner.programs.traces) == traces  # other weights, the same programs
    assert not any(weight.is_deleted() for weight in llm.engine.options.speculation.weights)
    assert_clean(llm)


def test_what_is_learned_are_the_tokens_that_replaced_proposals():
    emits_nQ = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    assert corrections(emits_nQ, 6) == (1, 5)
    assert corrections(emits_nQ, 5) == (1,)
    assert corrections(emits_nQ, 0) == ()


def test_a_text_that_its_caller_drops_is_forgotten(llm):
    learner = OnlineDraft(llm.engine)
    llm.watch = learner.see
    stream = llm.stream("ab" * 9, PARAMS)
    next(stream)
    assert learner._texts
    stream.close()
    llm.generate("x", replace(PARAMS, max_tokens=1))
    llm.watch = None
    assert not learner._texts
    assert not learner._wrong


def test_the_engine_makes_some_steps_between_two_of_training(llm):
    """Where enough has come to learn from all the time."""
    learner = OnlineDraft(llm.engine, interval=5, batch=1, row=64)
    learner._buffer.extend([([1, 2, 3], [2])] * 4)
    learned, counters = [], llm.engine.counters
    for _ in range(12):
        before = counters.draft_updates
        learner.see([])
        learned.append(counters.draft_updates - before)
    assert learned == [0, 0, 0, 0, 1] * 2 + [0, 0]


def test_a_step_needs_a_text(llm):
    with pytest.raises(ValueError, match="no text with a wrong proposal waits"):
        OnlineDraft(llm.engine).learn()


def test_a_learner_for_which_there_is_no_room_says_so(llm, monkeypatch):
    def full(*given):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes")

    monkeypatch.setattr("jaxinfer.training.online.initial_state", full)
    with pytest.raises(NoRoomError, match="no room beside the cache to train the draft; use fewer pages: RESOURCE"):
        OnlineDraft(llm.engine)


def test_what_cannot_learn_is_refused(llm, monkeypatch):
    for wrong, said in (
        ({"interval": 0}, "interval = 0 must be an integer, at least 1"),
        ({"interval": 1.5}, "interval = 1.5 must be an integer, at least 1"),
        ({"batch": True}, "batch = True must be an integer, at least 1"),
        ({"batch": 0}, "batch = 0 must be an integer, at least 1"),
        ({"row": 1}, "row = 1 must be an integer, at least 2"),
        ({"buffer": 7}, "buffer = 7 must be an integer, at least 8"),
        ({"learning_rate": 0.0}, r"learning_rate = 0\.0 must be above 0"),
    ):
        with pytest.raises(ValueError, match=said):
            OnlineDraft(llm.engine, **wrong)
    monkeypatch.setattr(llm.engine, "options", replace(OPTIONS, speculation=PromptLookup()))
    with pytest.raises(ValueError, match="must be a DraftModel, which can learn"):
        OnlineDraft(llm.engine)

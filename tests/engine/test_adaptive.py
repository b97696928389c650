"""An engine that chooses before every program how many tokens it proposes."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest

from jaxinfer import SamplingParams
from jaxinfer.cache import NULL_PAGE
from jaxinfer.decode.sampling import GREEDY
from jaxinfer.decode.slots import SlotState
from jaxinfer.decode.speculative import PromptLookup
from jaxinfer.engine import engine, warm_up
from jaxinfer.engine.constraints import Constraints
from jaxinfer.engine.costs import ENOUGH, Costs
from jaxinfer.engine.gate import Gate
from jaxinfer.engine.options import IN_FLIGHT
from jaxinfer.engine.sequence import constrained
from jaxinfer.engine.warm_up import WARM
from jaxinfer.llm import LLM
from tests.engine.fake import FakeTimes
from tests.engine.test_speculation import (
    CONSTRAINED,
    CONSTRAINED_PROMPTS,
    PARAMS,
    PROMPTS,
    always_right,
    answers,
    coupled,
)
from tests.engine.test_warm_up import counted
from tests.engine.tiny import OPTIONS, assert_clean, assert_warm, one_rectangle, tiny_folder, warm_llm
from tests.test_structured import ask

# Of one kind of sampling, and one rectangle. Loops: plain, and with 1 and 2 tokens proposed.
TRACES = {
    "admit": 2, "release": 1, "extend": 1, "step": 2 + 1, "mask": 1, "sample": 1, "finish": 1, "score": 1, "loop": 3,
    "propose": 1, "drafted": 1, "verify": 1,
}  # fmt: skip


class Changing(Gate):
    """Lets programs propose such numbers of tokens, whatever they bring."""

    def __init__(self, layout, numbers):
        super().__init__(layout)
        self._next, self.brought, self.timed = cycle(numbers), [], []

    def drafts(self, decoding):
        return next(self._next)

    def learn(self, brought_Q):
        self.brought.append(brought_Q.tolist())

    def time(self, contexts, drafts, seconds, checked=False):
        self.timed.append((len(contexts), drafts, seconds))


class Untimed(Gate):
    """Goes by what is predicted alone."""

    def time(self, contexts, drafts, seconds, checked=False):
        pass


def watched(llm: LLM, gate: Gate, run: Callable[[], object]) -> list[int]:
    """How many tokens each program of decode steps alone proposed."""
    scheduler, chosen = llm.engine.scheduler, []
    schedule = scheduler.schedule

    def scheduled():
        plan = schedule()
        if plan.decoding and not plan.chunks and plan.steps > 1:
            chosen.append(plan.drafts)
        return plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "schedule", scheduled)
        patch.setattr(scheduler, "gate", gate)
        patch.setattr(llm.engine, "gate", gate)
        run()
    return chosen


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory) -> LLM:
    """Its pool is too small for four long sequences. To compile less, one kind of sampling serves all."""
    options = replace(OPTIONS, speculation=PromptLookup(2, 3), num_pages=29, adaptive_speculation=True)
    with pytest.MonkeyPatch.context() as patch, one_rectangle():
        for module in (engine, warm_up):
            patch.setattr(module, "WARM", WARM[-1:])
        return LLM(tiny_folder(tmp_path_factory.getbasetemp()), options=options, warm_up=True)


def test_the_number_changes_no_output_and_compiles_nothing(tmp_path_factory, adaptive, one_rectangle):
    """Greedy and sampled, preempted and shared."""
    expected = answers(warm_llm(tmp_path_factory.getbasetemp()), PROMPTS, PARAMS)
    gate, counters, found = Changing(adaptive.engine.layout, [2, 0, 1, 2, 1, 0]), adaptive.engine.counters, []
    with counted("compile") as compilations:
        chosen = watched(adaptive, gate, lambda: found.append(answers(adaptive, PROMPTS, PARAMS)))
    assert found == [expected]
    assert {*chosen} == {0, 1, 2}
    assert counters.preemptions > 0
    told = np.array([[*brought, 0][:3] for brought in gate.brought]).sum(axis=0)
    assert [counters.drafts, *counters.accepted] == told.tolist()
    assert told[0] > told[1] > told[2] > 0
    assert compilations == []
    assert_warm(adaptive, TRACES)


def test_the_number_follows_what_is_right(adaptive, one_rectangle):
    """It is the most for what copies, falls where nothing can be foreseen, and rises where that copies again."""
    copied = SamplingParams(temperature=0.0, max_tokens=70, ignore_eos=True)
    random = SamplingParams(temperature=5.0, max_tokens=70, ignore_eos=True, seed=1)
    layout = adaptive.engine.layout
    gate = Untimed(layout, Costs(layout, FakeTimes(40.0, 1.0, 0.0)))
    chosen = []
    for params, count in ((copied, 4), (random, 12), (copied, 24)):
        prompts = ["ab" * 9] * count
        chosen += [watched(adaptive, gate, lambda prompts=prompts, params=params: adaptive.generate(prompts, params))]
    assert [Counter(programs[-9:]).most_common(1)[0][0] for programs in chosen] == [2, 0, 2]
    assert_warm(adaptive, TRACES)


def test_what_is_chosen_is_what_the_machine_is_predicted_to_do_best(adaptive, one_rectangle):
    """The engine's own gate asks its cost model."""
    gate, layout = adaptive.engine.gate, adaptive.engine.layout
    asked = []

    class Told(Costs):
        def __init__(self):
            super().__init__(layout, FakeTimes(1.0, 0.0, 0.0))

        def seconds(self, contexts, drafts, checked=False):
            asked.append(drafts)
            return {0: 9.0, 1: 1.0, 2: 3.0}[drafts]

    assert isinstance(gate._costs, Costs)
    chosen = watched(adaptive, Gate(layout, Told()), lambda: adaptive.generate(["ab"], SamplingParams(max_tokens=20)))
    assert [chosen[0], *set(chosen[IN_FLIGHT:])] == [1, 1]  # between them it waits for what the first one brings
    assert {*asked} == {0, 1, 2}


def test_text_that_nobody_foresees_is_decoded_plainly(adaptive, one_rectangle):
    """Where proposals would lose: all that the gate tries costs less than 3 in 100."""
    random = [SamplingParams(temperature=5.0, max_tokens=70, ignore_eos=True, seed=seed) for seed in range(48)]
    layout, took = adaptive.engine.layout, {}
    costs = Costs(layout, FakeTimes(4.0, 1.0, 0.0))  # verifying 2 tokens takes as long as 28 / 12 plain steps
    gates = {"plain": Changing(layout, [0]), "gated": Untimed(layout, costs), "always": Gate(layout)}
    for name, gate in gates.items():
        chosen = watched(adaptive, gate, lambda: adaptive.generate(["ab" * 9] * len(random), random))
        took[name] = sum(costs.predicted([1] * layout.slots, drafts) for drafts in chosen)
        assert name != "gated" or 0 < len([drafts for drafts in chosen if drafts]) < 0.03 * len(chosen)
    assert took["plain"] / took["gated"] > 0.97
    assert took["plain"] / took["always"] < 0.6


def test_a_host_that_takes_long_to_check_turns_proposals_off(adaptive, one_rectangle, monkeypatch):
    """Though all of them are right."""
    slow, told, chosen, masks = 0.15, [], [], Constraints.masks

    class Seen(Gate):
        def drafts(self, decoding):
            chosen.append(super().drafts(decoding))
            return chosen[-1]

        def time(self, contexts, drafts, seconds, checked=False):
            told.append((drafts, seconds, checked))
            super().time(contexts, drafts, seconds, checked)

    def slowly(self, drawing, vocab, drafts_Bk, parents_Bk):
        time.sleep(slow * drafts_Bk.shape[1])
        return masks(self, drawing, vocab, drafts_Bk, parents_Bk)

    layout = adaptive.engine.layout
    gate = Seen(layout, Costs(layout, FakeTimes(40.0, 1.0, 0.0)))
    monkeypatch.setattr(Constraints, "masks", slowly)
    monkeypatch.setattr(adaptive.engine, "gate", gate)
    monkeypatch.setattr(adaptive.engine.scheduler, "gate", gate)
    params = ask(max_tokens=70, temperature=0.0, regex="(the cat and ){5}")
    (output,) = adaptive.generate(["the cat and the cat and "], params)
    assert output.outputs[0].text == "the cat and " * 5
    assert all(checked for *_, checked in told)
    assert min(seconds for drafts, seconds, _ in told if drafts) >= 2 * slow
    assert ENOUGH <= chosen.count(2) <= ENOUGH + 2
    assert set(chosen[-20:]) == {0}


def test_the_gate_is_told_what_a_step_took(adaptive, one_rectangle, monkeypatch):
    """Of programs of decode steps alone, where it is known."""

    class Clock:
        asked = paused = 0

        def idle(self):
            self.paused += 1

        def wait(self, output, checked):
            self.asked += 1
            return None if self.asked % 4 == 0 else 8.0

    clock, gate, programs = Clock(), Changing(adaptive.engine.layout, [0, 1, 2]), []
    while adaptive.engine.busy:  # with what the test before left on its way
        adaptive.engine.step()
    commit = adaptive.engine._commit
    monkeypatch.setattr(adaptive.engine, "_clock", clock)
    monkeypatch.setattr(adaptive.engine, "_commit", lambda work: programs.append(work) or commit(work))
    params = SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)
    watched(adaptive, gate, lambda: adaptive.generate(["ab" * 9] * 2, params))
    known = [work.plan for number, work in enumerate(programs, 1) if number % 4]
    loops = [plan for plan in known if not plan.chunks]
    assert gate.timed == [(2, plan.drafts, 8.0 / OPTIONS.steps_per_dispatch) for plan in loops]
    assert 3 <= len(gate.timed) < len(programs)
    assert {drafts for _, drafts, _ in gate.timed} == {0, 1, 2}
    assert clock.paused == 1


def test_a_step_that_the_host_checks_proposes_all_or_none(tmp_path_factory, adaptive, one_rectangle, monkeypatch):
    """Where the gate else takes one token, or none. Nobody's keys are written where no page is."""
    runner, layout, gaps, chosen = adaptive.engine.runner, adaptive.engine.layout, [], set()

    class Turning(Costs):
        turn = 0

        def seconds(self, contexts, drafts, checked=False):
            self.turn += drafts == 0  # the first that is asked for
            return 1.0 if drafts == self.turn % 2 else 9.0

    class Seen(Gate):
        def drafts(self, decoding):
            chosen.add((constrained(decoding), drafts := super().drafts(decoding)))
            return drafts

    def looked(name, tokens):
        run = getattr(runner, name)

        def ran(slots_B, needs, given):
            gaps.append(without_page(runner.state, layout.page_size, tokens(given)))
            return run(slots_B, needs, given)

        monkeypatch.setattr(runner, name, ran)

    looked("loop", lambda drafts: OPTIONS.steps_per_dispatch * (1 + drafts))
    looked("verify", lambda masks: 1 + layout.depth)
    gate = Seen(layout, Turning(layout, FakeTimes(1.0, 0.0, 0.0)))
    monkeypatch.setattr(adaptive.engine, "gate", gate)
    monkeypatch.setattr(adaptive.engine.scheduler, "gate", gate)
    plain = warm_llm(tmp_path_factory.getbasetemp())
    for asked in ((CONSTRAINED_PROMPTS[:5], CONSTRAINED[:5]), (PROMPTS[:1], PARAMS[:1])):
        assert answers(adaptive, *asked) == answers(plain, *asked)
    assert chosen == {(False, 0), (False, 1), (True, 0), (True, 2)}
    assert gaps == [0] * len(gaps)
    assert_warm(adaptive, TRACES)


def without_page(state: SlotState, page_size: int, tokens: int) -> int:
    """In how many places of so many next tokens of each slot, until its output ends, keys would have no page."""
    length_B, left_B, active_B = (
        np.asarray(array) for array in (state.length_B, state.max_tokens_B - state.index_B, state.active_B)
    )
    places = [
        (slot, place)
        for slot in np.flatnonzero(active_B)
        for place in range(length_B[slot], length_B[slot] + min(tokens, left_B[slot]))
    ]
    tables = [np.asarray(table_BJ) for table_BJ in state.tables]
    return sum(table_BJ[slot, place // page_size] == NULL_PAGE for slot, place in places for table_BJ in tables)


@pytest.mark.parametrize(("method", "numbers"), [("draft", [2, 0, 1, 2, 1, 0]), ("early-exit", [2, 1, 1])])
def test_coupled_drafts_of_any_number_never_change_an_output(tmp_path_factory, one_rectangle, method, numbers):
    root = tmp_path_factory.getbasetemp()
    llm = coupled(root, method)
    gate, found, expected = Changing(llm.engine.layout, numbers), [], answers(warm_llm(root), PROMPTS, PARAMS)
    chosen = watched(llm, gate, lambda: found.append(answers(llm, PROMPTS, PARAMS)))
    assert found == [expected]
    assert {*chosen} == {*numbers}
    assert sum(brought[2] for brought in gate.brought if len(brought) > 2) > 0
    assert_clean(llm)


def test_a_draft_that_is_the_model_is_right_whatever_was_proposed_before(tmp_path_factory):
    """Its keys and values are there."""
    llm = always_right(tmp_path_factory.getbasetemp())
    gate = Changing(llm.engine.layout, [1, 3, 3, 1])
    params = SamplingParams(temperature=0.7, max_tokens=1 + 4 * (2 + 4 + 4 + 2), seed=1, ignore_eos=True)
    watched(llm, gate, lambda: llm.generate(["ab" * 9], params))
    assert gate.brought == [[4] * 2, [4] * 4, [4] * 4, [4] * 2]


def test_the_loops_of_a_request_can_be_compiled_alone(adaptive, one_rectangle):
    programs, params = adaptive.engine.runner.programs, SamplingParams(temperature=0.0)
    before = programs.traces["loop"]
    assert len(adaptive.engine.compile_loops(params).warmed) == 3  # plain, and with 1 and 2 tokens proposed
    assert programs.traces["loop"] == before + 3
    for drafts in (0, 1, 2):
        adaptive.engine.runner.loop(np.arange(4, dtype=np.int32), GREEDY, drafts)
    assert programs.traces["loop"] == before + 3


def test_a_warm_engine_has_timed_its_loops_for_the_gate(adaptive, monkeypatch):
    """Once all are ready."""
    one, order = adaptive.engine, []
    monkeypatch.setattr(engine, "WARM", WARM[-1:])
    monkeypatch.setattr(engine, "make_ready", lambda *given: order.append("ready") or "done")
    monkeypatch.setattr(engine, "time_loops", lambda *given: order.append(given))
    assert one.warm_up() == one.compile_loops(SamplingParams(temperature=0.0)) == "done"
    assert order == ["ready", (one.runner, WARM[-1], one.gate), "ready", (one.runner, GREEDY, one.gate)]

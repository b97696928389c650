"""Programs of decode steps propose tokens where that is predicted to pay: by the batch, and by what was right."""

import math
from dataclasses import replace

import numpy as np
import pytest

from jaxinfer.decode.layout import Layout
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.speculative import PromptLookup
from jaxinfer.engine import Options, Request
from jaxinfer.engine.costs import DRAW, MOVE, SEARCH, Costs
from jaxinfer.engine.gate import PROBES_APART, PROBES_COST, STANDS, Gate
from jaxinfer.engine.options import IN_FLIGHT
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sequence import Sequence
from jaxinfer.model import read_config
from jaxinfer.roofline import MEASURED, StepTimes, decode_step, independent
from tests.decode.branching import Branching
from tests.engine.fake import Chain, FakeTimes

DRAFTS, SLOTS = 4, 256
LAYOUT = Layout(SLOTS, 16, (4096,), 512, "bfloat16", speculation=PromptLookup(DRAFTS))
# The weights take as long as 40 tokens with their logits: a step of 1 sequence takes 42 where it verifies 50, one of
# 256 sequences 552 and 2,600.
TIMES = FakeTimes(40.0, 1.0, 0.0)
COSTS = Costs(LAYOUT, TIMES)
COST = {1: 50 / 42, 8: 120 / 56, 32: 360 / 104, 64: 680 / 168, 256: 2600 / 552}


def decoding(count: int, length: int = 100) -> list[Sequence]:
    return [Sequence(Request(number, (1,) * length, SamplingParams(), (), 0)) for number in range(count)]


def contexts(count: int, length: int = 100) -> list[int]:
    return [length] * count


def learn(gate: Gate, acceptance: float, rows: int) -> None:
    """What programs of 8 steps bring to so many sequences."""
    for _ in range(rows):
        gate.learn(8 * np.array([1, *independent(acceptance, DRAFTS)]))


def test_one_program_shows_what_new_texts_are_like():
    """Until it is read the next ones decode plainly; where it never is, as when its requests are dropped, another one
    is asked."""
    gate = Gate(LAYOUT, COSTS)
    asked = [gate.drafts(decoding(64)) for _ in range(3 * IN_FLIGHT)]
    assert asked == [DRAFTS, *[0] * (IN_FLIGHT - 1)] * 3
    learn(gate, 1.0, 64)
    assert [gate.drafts(decoding(64)) for _ in range(4)] == [DRAFTS] * 4
    always = Gate(Layout(SLOTS, 16, (4096,), 512, "bfloat16", speculation=PromptLookup(DRAFTS)), COSTS, always=True)
    assert [always.drafts(decoding(64)) for _ in range(4)] == [DRAFTS] * 4


LONG = 500  # rows after which nothing earlier counts


@pytest.mark.parametrize("batch", COST)
@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.5, 0.7, 0.9, 1.0])
def test_a_program_proposes_where_it_brings_more_tokens_a_second(batch, acceptance):
    gate = Gate(LAYOUT, COSTS)
    learn(gate, acceptance, LONG)
    tokens = sum(acceptance**place for place in range(DRAFTS + 1))
    assert gate.tokens(DRAFTS) == pytest.approx(tokens, rel=1e-2)
    assert gate.drafts(decoding(batch)) == (DRAFTS if tokens > COST[batch] else 0)
    assert gate.drafts(decoding(max(1, batch - 3))) == (DRAFTS if tokens > COST[batch] else 0)  # its rectangle


def test_an_engine_begins_with_proposals_and_soon_knows_better():
    for batch in (1, 64):
        gate, programs = Gate(LAYOUT, COSTS), 0
        while gate.drafts(decoding(batch)):
            learn(gate, 0.0, rows=batch)
            programs += 1
        assert 1 <= programs <= {1: 24, 64: 1}[batch]


def test_acceptance_that_recovers_turns_it_on_again():
    """A few programs show it, each of which comes when it is due."""
    gate, few = Gate(LAYOUT, COSTS), decoding(8)
    learn(gate, 0.0, LONG)
    due = max(PROBES_APART, math.ceil((COST[8] - 1) / PROBES_COST))
    waited = []  # programs without proposals before each that has some
    while not waited or waited[-1]:
        waited.append(0)
        while not gate.drafts(few):
            waited[-1] += 1
        learn(gate, 0.9, rows=8)
    assert gate.tokens(DRAFTS) > COST[8]
    assert waited == [due] * (len(waited) - 1) + [0]
    assert 2 <= len(waited) <= 5


@pytest.mark.parametrize("batch", [1, 8, 32, 256])
def test_what_probes_cost_is_bounded(batch):
    gate, some, programs = Gate(LAYOUT, COSTS), decoding(batch), 5000
    learn(gate, 0.0, LONG)
    proposing = sum(gate.drafts(some) > 0 for _ in range(programs))
    assert 0 < proposing <= programs / PROBES_APART
    assert proposing * (COST[batch] - 1) <= PROBES_COST * programs


def test_nothing_is_asked_of_the_text_where_even_all_that_is_right_would_lose():
    gate = Gate(LAYOUT, Costs(LAYOUT, FakeTimes(0.0, 1.0, 1.0)))  # k + 1 times as long
    assert not any(gate.drafts(decoding(1)) for _ in range(10 * PROBES_APART))


def test_without_times_it_is_open_and_without_a_method_shut():
    gate = Gate(LAYOUT)
    learn(gate, 0.0, LONG)
    assert gate.drafts(decoding(256)) == DRAFTS
    assert Gate(replace(LAYOUT, speculation=None)).drafts(decoding(1)) == 0


def test_what_a_method_runs_for_its_proposals_is_part_of_their_cost():
    draft, weights = FakeTimes(10.0, 1.0, 0.0), TIMES.weights
    costs = Costs(LAYOUT, TIMES, passes={DRAFTS: ((draft, 2), (draft, 1))})
    assert costs.seconds(contexts(8), 0) == weights + 16
    assert costs.seconds(contexts(8), DRAFTS) == weights + 80 + (10 + 16 + 8) + (10 + 8 + 8)


def test_a_tree_costs_its_nodes_and_brings_its_depth():
    class Heads(Branching):
        @property
        def outputs(self):
            return 2

    class Kernels(FakeTimes):
        def kernels(self, count):
            return float(count)

    layout = replace(LAYOUT, speculation=Heads())
    costs = Costs(layout, Kernels(40.0, 1.0, 0.0), layers=3)
    assert costs.seconds(contexts(8), 0) == 56
    assert costs.seconds(contexts(8), 4) == 40 + 2 * 8 * 10 + 2 * 8 + (SEARCH + DRAW * 5 + MOVE * 3)
    gate = Gate(layout, costs)
    assert (gate.tokens(4), len(gate.accepted), gate.drafts(decoding(1))) == (5, 4, 4)
    gate.learn(LONG * np.array([1000, 500, 0, 0, 0]))
    assert gate.tokens(4) == pytest.approx(1.5, rel=1e-3)


@pytest.mark.parametrize("attention", ["flash", "materialized"])
@pytest.mark.parametrize("batch", [1, 64, 256])
def test_it_asks_the_cost_model(attention, batch):
    """Where keys are gathered, for each slot's whole row of pages; and for the small kernels beside the model's."""
    config, machine = read_config("configs/models/llama-3-8b"), MEASURED["h100-measured"]
    row = LAYOUT.pages_per_row * LAYOUT.page_size if attention == "materialized" else None
    costs = Costs(LAYOUT, StepTimes(config, machine, decode_attention=attention), row)
    plain, verifying = (
        decode_step(config, batch, context, queries=queries, attention=attention).predict(machine)
        for queries, context in ((1, 100), (1 + DRAFTS, 100 + DRAFTS))
        for context in [row or context]
    )
    verifying += (SEARCH + DRAW * (1 + DRAFTS)) * machine.overhead
    assert costs.seconds(contexts(batch), 0) == pytest.approx(plain, rel=1e-9)
    assert costs.seconds(contexts(batch), DRAFTS) == pytest.approx(verifying, rel=1e-9)


class Counting(Costs):
    """Counts how often it is asked."""

    asked = 0

    def predicted(self, contexts, drafts):
        self.asked += 1
        return super().predicted(contexts, drafts)


def test_while_proposals_lose_few_programs_cost_the_host_anything():
    costs = Counting(LAYOUT, TIMES)
    gate, some = Gate(LAYOUT, costs), decoding(64)
    learn(gate, 0.0, LONG)
    for _ in range(4 * STANDS):
        assert gate.drafts(some) == 0
        gate.time(contexts(64), 0, 200.0)
    assert 8 <= costs.asked <= 12  # each time two kinds of programs, and what one took


def test_a_decision_stands_for_its_batch_alone_and_until_something_is_learnt():
    gate, checked = Gate(LAYOUT, Costs(LAYOUT, TIMES)), decoding(64)
    checked[0].constraint = Chain()
    learn(gate, 0.7, LONG)
    for other in (decoding(8), checked, decoding(64)):
        assert gate.drafts(decoding(64)) == 0
        assert gate.drafts(other) == (DRAFTS if len(other) == 8 else 0)
    learn(gate, 1.0, LONG)
    assert gate.drafts(decoding(64)) == DRAFTS


def test_the_scheduler_asks_for_programs_of_decode_steps_alone():
    """A step beside a prompt, or of nobody, is no program that could have proposed."""
    options = Options(max_num_seqs=4, max_num_batched_tokens=64, page_size=4, num_pages=99, steps_per_dispatch=3)
    layout = Layout(4, 4, (99,), 96, "float32", speculation=PromptLookup(2))
    asked = []

    class Seen(Gate):
        def drafts(self, decoding):
            asked.append(len(decoding))
            return 2 * (len(asked) % 2)

    plans = Scheduler(layout, (None,), replace(options, speculation=PromptLookup(2)), gate=Seen(layout))
    assert plans.schedule().drafts == 0
    for number in range(2):
        plans.add(Request(number, (1, 2, 3), SamplingParams(max_tokens=90, ignore_eos=True), (), 0))
    assert (plans.schedule().steps, asked) == (1, [])
    made = [plans.schedule() for _ in range(3)]
    assert [(plan.steps, plan.drafts) for plan in made] == [(3, 2), (3, 0), (3, 2)]
    assert asked == [2, 2, 2]
    assert [sequence.proposed for sequence in made[0].decoding] == [12, 12]


def test_a_step_beside_a_constraint_may_propose():
    """It is a single one, for all."""
    options = Options(
        max_num_seqs=4, max_num_batched_tokens=64, page_size=4, num_pages=99, steps_per_dispatch=3,
        speculation=PromptLookup(2),
    )  # fmt: skip
    plans = Scheduler(Layout(4, 4, (99,), 96, "float32", speculation=PromptLookup(2)), (None,), options)
    for number, constraint in enumerate((None, Chain())):
        plans.add(Request(number, (1, 2, 3), SamplingParams(max_tokens=90, ignore_eos=True), (), 0), constraint)
    assert plans.schedule().drafts == 0  # beside prompts
    made = [plans.schedule() for _ in range(2)]
    assert [(plan.steps, plan.drafts, len(plan.decoding)) for plan in made] == [(1, 2, 2)] * 2
    assert [(one.scheduled, one.proposed) for one in made[0].decoding] == [(3, 4)] * 2

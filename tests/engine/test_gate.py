"""Programs of decode steps propose tokens where that is predicted to pay: by the batch, and by what was right."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from jaxinfer.decode.layout import Layout
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.speculative import EarlyExit, PromptLookup
from jaxinfer.engine import Options, Request, budget
from jaxinfer.engine.budget import step_times, whole_row
from jaxinfer.engine.costs import DRAW, ENOUGH, MOVE, SEARCH, Costs, predicted_costs
from jaxinfer.engine.gate import PROBES_APART, PROBES_COST, STANDS, WRONG, Gate
from jaxinfer.engine.metrics import Counters
from jaxinfer.engine.options import IN_FLIGHT
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sequence import Sequence
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
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


# --- what programs took


def timed(gate: Gate, acceptance: float, batch: int, programs: int, slower: float, plain: float = 1.0) -> list[int]:
    """What a gate chooses for programs of 8 steps, each of which tells what it brought and took: so many times what is
    predicted of plain steps, and of those with proposals."""
    chosen, some, told, predicted = [], decoding(batch), contexts(batch), Costs(LAYOUT, TIMES)
    for _ in range(programs):
        chosen.append(drafts := gate.drafts(some))
        gate.time(told, drafts, (slower if drafts else plain) * predicted.seconds(told, drafts))
        for _ in some if drafts else ():
            gate.learn(8 * np.array([1, *independent(acceptance, drafts)]))
    return chosen


@pytest.mark.parametrize(("slower", "plain"), [(1.7, 1.0), (0.6, 1.0), (1.0, 1.6), (1.0, 0.6), (3.0, 3.0), (3.0, 2.0)])
@pytest.mark.parametrize("acceptance", [0.4, 0.6, 0.8])
def test_what_programs_take_corrects_what_is_predicted(acceptance, slower, plain):
    """In either direction, and where a kind of program would not run by itself."""
    gate, batch = Gate(LAYOUT, Costs(LAYOUT, TIMES)), 8
    timed(gate, acceptance, batch, 600, slower, plain)
    chosen = timed(gate, acceptance, batch, 200, slower, plain)
    tokens, cost = sum(acceptance**place for place in range(DRAFTS + 1)), COST[batch] * slower / plain
    assert abs(tokens / cost - 1) > 0.02  # no near tie, which either way is right
    assert chosen.count(DRAFTS if tokens > cost else 0) > 0.95 * len(chosen)


def test_one_program_that_was_held_up_corrects_nothing():
    costs, some = Costs(LAYOUT, TIMES), contexts(8)
    for drafts in (0, DRAFTS):
        for slower in (1.5, 1.5, 100.0, 1.5):
            costs.learn(some, drafts, slower * costs.predicted(some, drafts))
        assert costs.seconds(some, drafts) == pytest.approx(1.5 * costs.predicted(some, drafts))


def test_a_kind_of_program_that_was_hardly_timed_is_corrected_as_the_others():
    """So that none is favoured. Another rectangle is another matter."""
    costs, some = Costs(LAYOUT, TIMES), contexts(8)
    for slower in (1.9, 2.0, 2.1):
        assert costs.seconds(some, 0) / costs.predicted(some, 0) < 2.0
        costs.learn(some, DRAFTS, slower * costs.predicted(some, DRAFTS))
    costs.learn(some, 0, 9.0 * costs.predicted(some, 0))
    assert costs.seconds(some, 0) / costs.predicted(some, 0) == pytest.approx(2.05)
    assert costs.seconds(some, DRAFTS) / costs.predicted(some, DRAFTS) == pytest.approx(2.0)
    assert costs.seconds(contexts(9), 0) == costs.predicted(contexts(9), 0)


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("acceptance", [0.5, 0.7, 1.0])
def test_what_it_costs_to_time_plain_steps_is_bounded(batch, acceptance):
    gate, programs = Gate(LAYOUT, Costs(LAYOUT, TIMES)), 2000
    plain = timed(gate, acceptance, batch, programs, 1.0).count(0)
    speedup = gate.tokens(DRAFTS) / COST[batch]
    if speedup >= WRONG:
        assert plain == 0
    elif speedup > 1.02:
        assert 0 < plain <= programs / PROBES_APART
        assert plain * (speedup - 1) <= PROBES_COST * programs


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


# --- what the host checks

HOST = 30.0  # seconds of the host for each mask of a step: more than the 56 of a plain step of 8 sequences is long


def checked_by(host: float, acceptance: float, batch: int, programs: int) -> list[int]:
    """What a gate chooses for steps that the host checks, each of which tells what it took with the host's part in it:
    so long for the mask after the newest token of all sequences, and for those after each proposed one."""
    gate, some, told, predicted = Gate(LAYOUT, Costs(LAYOUT, TIMES)), decoding(batch), contexts(batch), COSTS
    some[0].constraint = Chain()
    chosen = []
    for _ in range(programs):
        chosen.append(drafts := gate.drafts(some))
        gate.time(told, drafts, predicted.predicted(told, drafts) + host * (1 + drafts), checked=True)
        for _ in some if drafts else ():
            gate.learn(np.array([1, *independent(acceptance, drafts)]))
    return chosen


@pytest.mark.parametrize(("host", "acceptance"), [(0.0, 0.7), (HOST, 0.7), (HOST, 0.95), (HOST / 3, 0.9)])
def test_what_the_host_takes_to_check_is_part_of_the_cost(host, acceptance):
    """Proposals for 8 sequences that would pay without its part may lose with it: plain steps then show that soon."""
    chosen = checked_by(host, acceptance, 8, 400)
    tokens, plain = sum(acceptance**place for place in range(DRAFTS + 1)), 56 + host
    cost = (120 + host * (1 + DRAFTS)) / plain
    assert abs(tokens / cost - 1) > 0.02
    assert tokens > COST[8]  # the device alone
    assert chosen.count(DRAFTS if tokens > cost else 0) > 0.95 * len(chosen)


def test_what_is_checked_and_what_is_not_correct_each_other_in_nothing():
    costs, some = Costs(LAYOUT, TIMES), contexts(8)
    for _ in range(ENOUGH):
        costs.learn(some, DRAFTS, 5.0 * costs.predicted(some, DRAFTS), checked=True)
    assert costs.timed(some, DRAFTS, checked=True)
    assert not costs.timed(some, DRAFTS)
    assert costs.seconds(some, DRAFTS) == costs.predicted(some, DRAFTS)
    assert costs.seconds(some, 0, checked=True) == 5.0 * costs.predicted(some, 0)


# --- as many tokens as bring the most

ADAPTIVE = replace(LAYOUT, adaptive=True)
SECONDS = {  # by sequences, and tokens proposed to each
    batch: {drafts: TIMES.weights + 2 * batch * (1 + drafts) for drafts in (0, 1, 2, 4)} for batch in (1, 8, 32)
}


def brought(gate: Gate, acceptance: float, batch: int, programs: int) -> list[int]:
    """What a gate chooses for programs of 8 steps, each of which tells what it brought."""
    chosen, some = [], decoding(batch)
    for _ in range(programs):
        chosen.append(drafts := gate.drafts(some))
        for _ in some if drafts else ():
            gate.learn(8 * np.array([1, *independent(acceptance, drafts)]))
    return chosen


@pytest.mark.parametrize(("most", "choices"), [(1, (1,)), (2, (1, 2)), (5, (1, 2, 4, 5)), (8, (1, 2, 4, 8))])
def test_the_choices_are_powers_of_two_and_the_most(most, choices):
    layout = replace(ADAPTIVE, speculation=PromptLookup(most))
    assert layout.choices == choices
    assert [layout.method(drafts).num_speculative_tokens for drafts in choices] == [*choices]
    assert replace(layout, adaptive=False).choices == (most,)


@pytest.mark.parametrize("batch", SECONDS)
@pytest.mark.parametrize("acceptance", [0.05, 0.3, 0.5, 0.7, 0.95])
def test_as_many_tokens_are_proposed_as_bring_the_most_a_second(acceptance, batch):
    """In the long run, but for probes and what is as good, and whatever was believed before."""
    rates = {
        drafts: (1 - acceptance ** (drafts + 1)) / (1 - acceptance) / seconds
        for drafts, seconds in SECONDS[batch].items()
    }
    for earlier in (0.0, 1.0):
        gate = Gate(ADAPTIVE, Costs(ADAPTIVE, TIMES))
        learn(gate, earlier, LONG)
        brought(gate, acceptance, batch, 1500)
        chosen = brought(gate, acceptance, batch, 300)
        found = sum(rates[drafts] * SECONDS[batch][drafts] for drafts in chosen)
        assert found > 0.985 * max(rates.values()) * sum(SECONDS[batch][drafts] for drafts in chosen), Counter(chosen)


def test_the_choice_follows_the_text_down_and_up():
    """At the pace at which what is remembered fades."""
    gate = Gate(ADAPTIVE, Costs(ADAPTIVE, TIMES))
    phases = [brought(gate, acceptance, 8, 60) for acceptance in (0.95, 0.3, 0.95)]
    assert [phase[-1] for phase in phases] == [4, 1, 4]
    assert phases[1].index(1) <= 10
    assert phases[2].index(4) <= 10
    assert all(phase.count(0) <= 1 for phase in phases)  # to see what plain steps take


def test_what_was_not_proposed_is_taken_to_be_right_as_often_as_the_last():
    gate = Gate(ADAPTIVE, Costs(ADAPTIVE, TIMES))
    for _ in range(LONG):
        gate.learn(8 * np.array([1, 0.5, 0.4]))
    assert gate.accepted == pytest.approx([0.5, 0.4, 0.32, 0.256], rel=1e-3)
    for _ in range(10 * LONG):
        gate.learn(np.array([1000, 0]))
    assert gate.accepted == pytest.approx([0, 0, 0, 0])


@pytest.mark.parametrize("plain", [0, 30])
@pytest.mark.parametrize("acceptance", [0.0, 0.6, 1.0])
def test_a_gain_is_predicted_of_what_was_right_and_what_steps_cost(acceptance, plain):
    """By the cost model alone, whatever steps took: of steps with proposals, and plain ones among them."""
    costs, right = Costs(LAYOUT, TIMES), [round(100 * part) for part in independent(acceptance, DRAFTS)]
    costs.learn([100], DRAFTS, 9.0)
    told, before = Counters(output_tokens=1 + plain), Counters(output_tokens=7, accepted=(2,))
    told.count_drafts(np.array([100, *right]))
    told = replace(told, output_tokens=told.output_tokens + 100 + sum(right))
    tokens = 1 + sum(right) / 100
    assert costs.cost(100, told) == pytest.approx(COST[1])
    assert costs.speedup(100, told) == pytest.approx((100 * tokens + plain) / (100 * COST[1] + plain))
    later = replace(told, output_tokens=told.output_tokens + 7, accepted=(right[0] + 2, *right[1:]))
    assert later.since(before) == told


def test_a_gain_of_proposals_of_several_sizes_is_predicted():
    told, costs = Counters(output_tokens=1 + 2 + 1 + 4), Costs(ADAPTIVE, TIMES)
    told.count_drafts(np.array([2, 1]))
    told.count_drafts(np.array([1, 1, 1, 1, 0]))
    assert told.proposed == (2, 0, 0, 1)
    seconds = 2 * costs.predicted([9], 1) + costs.predicted([9], 4)
    assert costs.speedup(9, told) == pytest.approx(7 * costs.predicted([9], 0) / seconds)
    assert costs.speedup(9, Counters(output_tokens=5)) == 1


def test_a_probe_finds_what_only_more_proposals_show():
    """Text that copies for long where it copies at all: with few proposals its worth is not seen."""
    gate = Gate(ADAPTIVE, Costs(ADAPTIVE, TIMES))
    learn(gate, 0.3, LONG)
    few, waited = decoding(8), 0
    while gate.drafts(few) < DRAFTS:
        gate.learn(8 * np.array([8, 8 * 0.3]))
        waited += 1
    ratio = SECONDS[8][4] / SECONDS[8][1]
    assert waited == max(PROBES_APART, math.ceil((ratio - 1) / PROBES_COST))


def test_an_engine_that_always_proposes_chooses_how_many():
    gate = Gate(ADAPTIVE, Costs(ADAPTIVE, TIMES), always=True)
    assert 0 not in brought(gate, 0.0, 32, 100)
    assert brought(gate, 0.0, 32, 1) == [1]


@pytest.mark.parametrize(("acceptance", "best", "allowed"), [(0.5, 1, 0), (0.7, 2, DRAFTS)])
def test_what_the_host_checks_proposes_all_or_none(acceptance, best, allowed):
    """Whichever brings more, where another number would bring the most; all where something is always proposed."""
    free, checked = decoding(8), decoding(8)
    checked[-1].constraint = Chain()
    for always in (False, True):
        gate = Gate(ADAPTIVE, Costs(ADAPTIVE, TIMES), always)
        learn(gate, acceptance, LONG)
        assert [gate.drafts(free), gate.drafts(checked)] == [best, DRAFTS if always else allowed]


def test_fewer_tokens_take_fewer_passes(monkeypatch):
    """Of a draft, whose every token takes one."""
    monkeypatch.setattr(budget, "known_machine", lambda dtype: MEASURED["h100-measured"])
    model = Model(read_config("configs/models/llama-3-8b"), make_mesh(1))
    layout = replace(ADAPTIVE, speculation=EarlyExit(DRAFTS, 8))
    first = replace(model.config, layers=model.config.layers[:8])
    costs, some = predicted_costs(model, layout), contexts(8)
    own = step_times(model, layout, first)
    plain = Costs(ADAPTIVE, step_times(model, layout), whole_row(layout))
    for drafts in layout.choices:
        read = whole_row(layout) or 100 + drafts
        proposing = drafts * own.decode(8, own.decoding([read] * 8))
        assert costs.seconds(some, drafts) == pytest.approx(plain.seconds(some, drafts) + proposing, rel=1e-9)


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

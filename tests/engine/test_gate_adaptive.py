"""A gate that chooses how many tokens programs propose: as many as bring the most a second."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from jaxinfer.decode.speculative import EarlyExit, PromptLookup
from jaxinfer.engine import budget
from jaxinfer.engine.budget import step_times, whole_row
from jaxinfer.engine.costs import Costs, predicted_costs
from jaxinfer.engine.gate import PROBES_APART, PROBES_COST, Gate
from jaxinfer.engine.metrics import Counters
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.roofline import MEASURED, independent
from tests.engine.fake import Chain
from tests.engine.test_gate import COST, DRAFTS, LAYOUT, LONG, TIMES, contexts, decoding, learn

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

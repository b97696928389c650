"""What the gate goes by: what programs took corrects what was predicted."""

import numpy as np
import pytest

from jaxinfer.engine.costs import ENOUGH, Costs
from jaxinfer.engine.gate import PROBES_APART, PROBES_COST, WRONG, Gate
from jaxinfer.roofline import independent
from tests.engine.fake import Chain
from tests.engine.test_gate import COST, COSTS, DRAFTS, LAYOUT, TIMES, contexts, decoding


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

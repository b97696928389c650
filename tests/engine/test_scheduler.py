"""Who runs, who waits and who gives way; on the host alone."""

from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.serving.workload import WORKLOADS
from jaxinfer.cli.models import MODELS
from jaxinfer.decode.layout import Layout
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.structured_params import StructuredOutputsParams
from jaxinfer.engine import Options, Request
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sequence import Sequence
from jaxinfer.model import read_config
from jaxinfer.roofline import find_hardware, plan_memory
from tests.engine.fake import Chain, Told, fake_engine, gather, run

OPTIONS = Options(max_num_seqs=4, max_num_batched_tokens=64, page_size=4, num_pages=41, steps_per_dispatch=3)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def request(
    number: int, prompt: int | tuple[int, ...], new: int, priority: int = 0, arrived: float = 0.0, **params
) -> Request:
    """A prompt of so many tokens that no other one has, or the given one."""
    ids = prompt if isinstance(prompt, tuple) else tuple(range(100 * number, 100 * number + prompt))
    given = SamplingParams(**{"max_tokens": new, "ignore_eos": True} | params)
    return Request(number, ids, given, (), 0, priority, arrived)


def scheduler(num_pages: int = 41, windows: tuple[int | None, ...] = (None,), **options) -> Scheduler:
    given = replace(OPTIONS, **options)
    layout = Layout(given.max_num_seqs, given.page_size, (num_pages,) * len(windows), 160, "float32")
    return Scheduler(layout, windows, given)


def ends(engine, requests: list[Request]) -> list[int]:
    """The requests' ids in the order in which they end."""
    order = []
    for each in requests:
        engine.add(each)
    while engine.busy:
        order += [update.request.id for update in engine.step() if update.finish_reason]
    return order


def test_pages_come_with_the_tokens():
    plans = scheduler()
    plans.add(request(0, 70, 50))
    sequence = plans.schedule().chunks[0].sequence
    assert sequence.columns == 16  # of a chunk of 64 tokens, not of 70, nor of 120
    plans.schedule()
    assert sequence.columns == 18
    for step in range(1, 10):
        plan = plans.schedule()
        assert not plan.chunks
        assert sequence.columns == -(-(70 + 3 * step) // 4)
        assert sum(column >= 18 for *_, column, _ in plan.entries) == len(plan.entries) <= 1


def test_slot_and_pages_are_free_when_the_last_token_is_on_its_way():
    plans = scheduler(max_num_seqs=1)
    plans.add(request(0, 5, 3))
    plans.add(request(1, 5, 3))
    assert [chunk.sequence.request.id for chunk in plans.schedule().chunks] == [0]
    assert [sequence.request.id for sequence in plans.schedule().decoding] == [0]
    assert [chunk.sequence.request.id for chunk in plans.schedule().chunks] == [1]
    assert list(plans.sequences) == [0, 1]


def test_the_last_gives_way_and_the_first_never_does():
    engine = fake_engine(replace(OPTIONS, num_pages=19, enable_prefix_caching=False), 72, (None,))
    assert ends(engine, [request(number, 8, 64) for number in range(2)]) == [0, 1]
    assert engine.counters.preemptions == 1
    recomputed = engine.counters.prefilled_tokens - 2 * 8
    assert 8 < recomputed < 72  # the second one's, once


def test_what_the_device_is_told_of_a_request_is_made_once_and_after_a_preemption_anew(monkeypatch):
    engine = fake_engine(replace(OPTIONS, num_pages=19), 72, (None,))
    made, admission = [], engine.runner.programs.admission

    def counted(params, pages, prompt_ids, eos_ids, seed, output_ids):
        made.append((prompt_ids[0], len(output_ids) > 0))
        return admission(params, pages, prompt_ids, eos_ids, seed, output_ids)

    monkeypatch.setattr(engine.runner.programs, "admission", counted)
    assert ends(engine, [request(number, 8, 64) for number in range(2)]) == [0, 1]
    assert engine.counters.preemptions == 1
    assert made == [(0, False), (100, False), (100, True)]


def test_those_that_begin_together_are_admitted_and_stopped_in_one_call(monkeypatch):
    """Each call is a program on its way to a device, before which only a few may wait."""
    engine, calls = fake_engine(OPTIONS, 160, (None,)), []
    programs = engine.runner.programs
    admit, release = programs.admit, programs.release
    monkeypatch.setattr(programs, "admit", lambda state, rows: calls.append(sorted(rows)) or admit(state, rows))
    monkeypatch.setattr(programs, "release", lambda state, some: calls.append([*some]) or release(state, some))
    for number in range(4):
        engine.add(request(number, 8, 20))
    engine.step()
    engine.abort(0, 2, 7)
    engine.step()
    assert calls == [[0, 1, 2, 3], [0, 2]]
    assert [slot.active for slot in engine.runner.state] == [False, True, False, True]


def test_what_a_preempted_sequence_had_is_found_again():
    """The third of them, when the second has ended."""
    engine = fake_engine(replace(OPTIONS, num_pages=30), 72, (None,))
    assert ends(engine, [request(number, 8, new) for number, new in enumerate([64, 32, 40])]) == [1, 2, 0]
    assert engine.counters.preemptions == 1
    assert engine.counters.prefix_hits == 32
    assert engine.counters.prefilled_tokens == 3 * 8 + 4


def test_each_program_is_dispatched_before_the_one_before_is_read(monkeypatch):
    engine, order = fake_engine(OPTIONS, 160, (None,)), []

    def logged(owner, name, what):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: order.append(what) or call(*given))

    logged(engine.runner, "step", "dispatch")
    logged(engine.runner, "loop", "dispatch")
    logged(engine, "_commit", "read")
    assert ends(engine, [request(0, 8, 10)]) == [0]
    programs = 1 + 9 // OPTIONS.steps_per_dispatch
    assert order == ["dispatch", *["dispatch", "read"] * (programs - 1), "read"]


def test_lower_priorities_go_first_and_equal_ones_by_arrival():
    engine = fake_engine(replace(OPTIONS, max_num_seqs=1), 160, (None,))
    order = ends(engine, [request(number, 8, 8, priority) for number, priority in enumerate([0, 2, 1, -1, 1, 0])])
    assert order == [3, 0, 5, 2, 4, 1]


def test_of_two_that_run_the_one_of_higher_number_gives_way():
    engine = fake_engine(replace(OPTIONS, num_pages=19), 72, (None,))
    assert ends(engine, [request(0, 8, 64, priority=1), request(1, 8, 64, priority=0)]) == [1, 0]
    assert engine.counters.preemptions >= 1


def test_prompts_take_the_budget_by_rank_whether_they_run_or_wait():
    plans = scheduler(num_pages=61)
    expected = [[(0, 64)], [(1, 64)], [(1, 6), (0, 6), (2, 52)]]
    for number, (priority, taken) in enumerate(zip([2, 1, 3], expected, strict=True)):
        plans.add(request(number, 70, 8, priority))
        assert [(chunk.sequence.request.id, chunk.tokens) for chunk in plans.schedule().chunks] == taken


@pytest.mark.parametrize("room", [{"max_num_seqs": 1}, {"num_pages": 22}])
def test_where_the_first_that_waits_finds_no_room_those_that_run_go_on(room):
    plans = scheduler(**room)
    plans.add(request(0, 70, 8, priority=2))
    plans.schedule()
    plans.add(request(1, 20, 8, priority=1))
    plans.add(request(2, 2, 8, priority=1))  # which would find it
    assert [(chunk.sequence.request.id, chunk.tokens) for chunk in plans.schedule().chunks] == [(0, 6)]


def test_who_waits_too_long_is_told():
    engine = fake_engine(replace(OPTIONS, max_num_seqs=1, max_waiting_time=5.0), 160, (None,))
    engine.scheduler.clock = clock = Clock()
    told: Told = {}
    engine.add(request(0, 8, 40))
    engine.add(request(1, 8, 8))
    gather(told, engine.step())
    clock.now = 4.0
    engine.add(request(2, 8, 8, arrived=4.0))
    clock.now = 5.5
    run(engine, told)
    assert told[1] == ([], "timeout")
    assert [told[number][1] for number in (0, 2)] == ["length", "length"]
    assert engine.counters.timeouts == 1


def test_without_a_limit_nobody_looks_how_long_others_wait():
    plans = scheduler()
    plans.add(request(0, 8, 8))
    plans.waiting = None  # which therefore is not looked through
    assert plans.expired() == []


def test_who_waits_for_a_constraint_waits():
    """Of three of the same age one never gets its own, one no slot after it, and one is in time."""
    engine = fake_engine(replace(OPTIONS, max_num_seqs=1, max_waiting_time=5.0), 160, (None,))
    engine.scheduler.clock = clock = Clock()
    making = [Future() for _ in range(3)]
    engine._constraints._pool = SimpleNamespace(submit=lambda *_: making[len(engine._constraints)])
    bound = {"structured_outputs": StructuredOutputsParams(regex="a"), "ignore_eos": False}
    for number in range(3):
        engine.add(request(number, 8, 40, **bound))
    updates = []
    for clock.now, number in ((2.0, 2), (4.0, 1)):
        making[number].set_result(Chain())
        updates += engine.step()
    clock.now = 5.5
    while engine.busy:
        updates += engine.step()
    assert [update.queued for update in updates if update.queued is not None] == [2.0]
    told = {update.request.id: update.finish_reason for update in updates if update.finish_reason}
    assert told == {0: "timeout", 1: "timeout", 2: "length"}
    assert engine.counters.timeouts == 2


def test_the_first_token_tells_how_long_its_request_waited():
    engine = fake_engine(replace(OPTIONS, num_pages=19), 72, (None,))
    engine.scheduler.clock = clock = Clock()
    for number in range(2):
        engine.add(request(number, 8, 64))
    waited, tokens = {}, {0: 0, 1: 0}
    while engine.busy:
        clock.now += 2.0  # a second wait, after a preemption, is none of the queue
        for update in engine.step():
            if not tokens[update.request.id]:
                waited[update.request.id] = update.queued
            else:
                assert update.queued is None
            tokens[update.request.id] += len(update.tokens)
    assert engine.counters.preemptions
    assert (waited, tokens) == ({0: 2.0, 1: 2.0}, {0: 64, 1: 64})


def test_who_ran_once_may_wait_on():
    engine = fake_engine(replace(OPTIONS, num_pages=19, max_waiting_time=5.0), 72, (None,))
    engine.scheduler.clock = clock = Clock()
    told: Told = {}
    for number in range(2):
        engine.add(request(number, 8, 64))
    while not engine.counters.preemptions:
        gather(told, engine.step())
    clock.now = 100.0
    run(engine, told)
    assert [told[number][1] for number in range(2)] == ["length", "length"]


def test_the_continuations_of_one_prompt_compute_it_once():
    engine = fake_engine(OPTIONS, 160, (None, 7))
    assert ends(engine, [request(number, tuple(range(30)), 8) for number in range(4)]) == [0, 1, 2, 3]
    # All in one step; 28 of 30 tokens fill pages.
    assert engine.counters.prefilled_tokens == 30 + 3 * 2
    assert engine.metrics.prefix_hit_rate == 3 * 28 / (4 * 30)


@pytest.mark.parametrize("length", [27, 28, 29])
def test_the_last_token_of_a_prompt_is_always_computed(length):
    engine = fake_engine(OPTIONS, 160, (None,))
    for number in range(2):
        engine.add(request(number, tuple(range(length)), 8))
        run(engine, {})
    assert engine.counters.prefix_hits == (length - 1) // 4 * 4


def test_a_hit_must_hold_in_every_group():
    """The window group lost its pages to other texts, the other one has them all."""
    engine = fake_engine(OPTIONS, 160, (None, 7))
    text = tuple(range(41))
    engine.add(request(0, text, 4))
    run(engine, {})
    full, window = engine.scheduler.paging.pools
    sequence = Sequence(request(1, text, 4))
    assert engine.scheduler.paging.found(sequence) == 10
    lost = window.find(sequence.key(9, 4))
    while window.find(sequence.key(9, 4)) is not None:
        window.allocate(1)
    assert lost is not None
    assert full.find(sequence.key(9, 4)) is not None
    assert engine.scheduler.paging.found(sequence) < 10


def test_prompt_logprobs_compute_the_whole_prompt():
    plans = scheduler()
    params = SamplingParams(max_tokens=4, prompt_logprobs=2)
    for number, each in enumerate([SamplingParams(max_tokens=4), params]):
        plans.add(Request(number, tuple(range(30)), each, (), 0))
    assert [chunk.tokens for chunk in plans.schedule().chunks] == [30, 30]


def test_a_window_keeps_no_more_pages_than_it_sees():
    plans = scheduler(windows=(None, 9))
    plans.add(request(0, 20, 100))
    sequence = plans.schedule().chunks[0].sequence
    for _ in range(20):
        plans.schedule()
    full, window = (len(pages) - first for pages, first in zip(sequence.pages, sequence.first, strict=True))
    assert full == -(-(20 + 60) // 4)
    assert window <= (9 - 1 + 3) // 4 + 2
    assert plans.paging.pools[1].used == window


def test_a_window_pool_need_not_hold_the_whole_text():
    engine = fake_engine(replace(OPTIONS, num_pages=40), 156, (None, 9))
    engine.scheduler.paging.pools[1].allocate(35)  # leaves 4
    assert not engine.problems(request(0, 100, 50))
    assert ends(engine, [request(0, 100, 50), request(1, 30, 20)]) == [0, 1]


def use_and_waste(pages: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a pool of so many pages of 64, the fractions in use and in use without a token, after every program for 256
    requests of 200 to 2048 tokens that come at once."""
    options = Options(max_num_seqs=256, max_num_batched_tokens=8192, page_size=64, num_pages=pages + 1)
    plans = Scheduler(Layout(256, 64, (pages + 1,), 2048, "float32"), (None,), options)
    found = []
    for number, (prompt, output) in enumerate(WORKLOADS["256 requests"].sizes):
        plans.add(request(number, prompt, output))
    while plans.sequences:
        plan = plans.schedule()
        for sequence in (*plan.decoding, *(chunk.sequence for chunk in plan.chunks)):
            sequence.in_flight -= 1
        for sequence in list(plans.sequences.values()):
            most = sequence.request.params.max_tokens
            sequence.tokens += [0] * (min(sequence.scheduled, most) - sequence.outputs)
            if sequence.all_scheduled:
                plans.finish(sequence)
        found.append((plans.paging.pools[0].used, plans.paging.waste(list(plans.running.values())) / 64))
    used, wasted = np.transpose(found) / pages
    return used, wasted


def test_under_four_percent_of_the_pool_is_wasted():
    """At any moment of what an H200 has beside Llama-3-8B; on the average of a pool that they just fill."""
    h200 = plan_memory(read_config(MODELS / "llama-3-8b"), find_hardware("h200"), 256, 2048, page_size=64, chunk=8192)
    used, wasted = use_and_waste(int(h200.cache // (64 * h200.per_token)))
    assert max(used) > 0.2
    assert max(wasted) < 0.01
    used, wasted = use_and_waste(2880)
    assert max(used) > 0.99
    assert np.mean(wasted[used > 0.7]) < 0.04
    assert max(wasted) < 0.05


def test_what_can_never_run_is_refused():
    engine = fake_engine(OPTIONS, 400, (None, 9))
    engine.add(request(0, 60, 100))
    with pytest.raises(ValueError, match=r"id = 0 is that of a request that has not ended"):
        engine.add(request(0, 5, 5))
    with pytest.raises(ValueError, match=r"need 41 pages of 4 tokens; the cache has 40"):
        engine.add(request(1, 61, 100))
    with pytest.raises(ValueError, match=r"priority = 0.5 must be an integer"):
        engine.add(request(1, 5, 5, priority=0.5))
    run(engine, {})
    engine.add(request(0, 5, 5))


def test_metrics_say_what_there_is():
    engine = fake_engine(replace(OPTIONS, max_num_seqs=2), 160, (None, 9))
    for number in range(3):
        engine.add(request(number, 10, 20))
    engine.step()
    metrics = engine.metrics
    assert (metrics.waiting, metrics.running) == (1, 2)
    assert (metrics.pages_total, metrics.pages_used, metrics.pages_cached) == (80, 2 * 2 * 3, 0)
    assert metrics.wasted_slots == 2 * 2 * 2
    assert metrics.cache_use == 12 / 80
    run(engine, {})
    metrics = engine.metrics
    assert (metrics.waiting, metrics.running, metrics.pages_used, metrics.wasted_slots) == (0, 0, 0, 0)
    assert metrics.pages_cached > 0
    assert metrics.counters.output_tokens == 3 * 20
    assert metrics.counters.prefilled_tokens == 3 * 10

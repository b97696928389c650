"""Requests that are dropped, whatever they are at."""

from dataclasses import replace

import pytest

from tests.engine.fake import Told, fake_engine, gather, run
from tests.engine.test_scheduler import OPTIONS, ends, request


def test_an_abort_that_fails_ends_all_that_runs_and_the_engine_goes_on(monkeypatch):
    def fails(slots):
        raise ZeroDivisionError("planted")

    engine = fake_engine(OPTIONS, 160, (None,))
    for number in range(2):
        engine.add(request(number, 8, 40))
    engine.step()
    with monkeypatch.context() as patched:
        patched.setattr(engine.runner, "release", fails)
        with pytest.raises(ZeroDivisionError):
            engine.abort(0)
    assert [(update.request.id, update.finish_reason) for update in engine.step()] == [(1, "abort")]
    assert not engine.busy
    assert ends(engine, [request(0, 8, 40)]) == [0]


@pytest.mark.parametrize("moment", range(12))
def test_a_request_can_be_dropped_at_any_moment(moment):
    """While it waits, is prefilled, decodes, was preempted, or has its last tokens on their way."""
    engine = fake_engine(replace(OPTIONS, max_num_seqs=2, num_pages=19), 72, (None,))
    engine.budget.most = 5
    for number in range(3):
        engine.add(request(number, 8, [10, 50, 8][number]))
    told: Told = {}
    for _ in range(moment):
        gather(told, engine.step())
    running = [number for number in range(3) if told.get(number, ([], None))[1] is None]
    for number in running:
        engine.abort(number)
        engine.abort(number)
    assert not engine.scheduler.sequences
    assert [pool.used for pool in engine.scheduler.paging.pools] == [0]
    assert not any(slot.active for slot in engine.runner.state)
    before = {number: list(told.get(number, ([], None))[0]) for number in running}
    run(engine, told)
    assert {number: told.get(number, ([], None))[0] for number in running} == before

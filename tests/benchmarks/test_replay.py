"""Programs of an engine are run again as they were."""

import itertools

import numpy as np
import pytest

from benchmarks.serving import replay
from benchmarks.serving.latency import Desk
from jaxinfer.roofline import find_hardware
from tests.engine.tiny import assert_warm, warm_llm


def test_a_step_that_is_run_again_draws_the_same_tokens(tmp_path_factory, monkeypatch):
    """Of sequences that decode beside a prompt: they stand where they stood, with the pages that they had."""
    llm = warm_llm(tmp_path_factory.getbasetemp())
    desk, runner, drawn = Desk("tiny", llm.engine, find_hardware("h200")), llm.engine.runner, []
    step = runner.step

    def kept(*given):
        output = step(*given)
        drawn.append((np.asarray(output.sampled.tokens_W), np.asarray(output.emits_nW)))
        return output

    monkeypatch.setattr(runner, "step", kept)
    few, long = desk.draw(2, 6, 80), desk.draw(1, 90, 4)
    desk.ask(few)
    desk.hear_first(few)
    desk.hear()
    since, _ = replay.standing(runner), drawn.clear()
    with replay.noted(runner, "step") as calls:
        desk.ask(long)
        desk.hear_first(long)
    seen = drawn.copy()
    assert len(calls) == len(seen) == 2
    assert [emits.sum() for _, emits in seen] == [2, 3]
    found = replay.seconds(runner, runner.step, calls, since)
    assert (found.shape, found.min() > 0) == ((1,), True)
    assert len(drawn) == 2 * (1 + replay.ROUNDS)
    for (tokens, emits), (again, emits_again) in zip(seen * (1 + replay.ROUNDS), drawn, strict=True):
        np.testing.assert_array_equal(emits, emits_again)
        np.testing.assert_array_equal(tokens[emits], again[emits])
    desk.clear()
    assert_warm(llm)


@pytest.mark.parametrize("count", [2, replay.AHEAD, 3 * replay.AHEAD])
def test_some_programs_are_always_on_their_way(monkeypatch, count):
    """The host waits for one when so many more are dispatched, or all."""
    order, clock = [], itertools.count()
    monkeypatch.setattr(replay, "_end", lambda number: order.append(("end", number)) or next(clock))
    assert replay._ends(lambda number: order.append(("begin", number)) or number, [(n,) for n in range(count)]) == [
        *range(count)
    ]
    for number in range(count):
        after = order.index(("end", number))
        begun = sum(what == "begin" for what, _ in order[:after])
        assert begun == min(number + replay.AHEAD, count)

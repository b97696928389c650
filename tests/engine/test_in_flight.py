"""Pages that are taken from a request while programs that write to them have yet to run, and given to others."""

from dataclasses import replace
from random import Random

import jax
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.engine import Request
from tests.engine.tiny import OPTIONS, assert_clean, drawing_alike, one_rectangle, tiny_folder

STEPS = 32  # of a loop: the host is back long before the device has run them
FEW = replace(OPTIONS, steps_per_dispatch=STEPS, num_pages=24)
SHARED = tuple(range(3, 27))  # three pages
PROMPTS = [(*SHARED, 40), (*SHARED[:16], 41, 42, 43), SHARED + tuple(range(50, 58)), (60, 61), tuple(range(20, 60))]
PARAMS = [SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True) for tokens in (50, 9, 33)]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """An engine with too few pages for all of its four slots."""
    with one_rectangle():
        yield drawing_alike(LLM(tiny_folder(tmp_path_factory.getbasetemp()), options=FEW))


@pytest.fixture(scope="module")
def alone(few):
    """What each request says when nothing else runs."""
    return [
        tuple(few.generate([list(prompt)], params)[0].outputs[0].token_ids) for prompt in PROMPTS for params in PARAMS
    ]


def unfinished(engine) -> bool:
    """Whether the device has yet to run what was dispatched last."""
    return bool(engine._in_flight) and not engine._in_flight[-1].output.emits_nW.is_ready()


def test_whoever_gets_the_pages_says_what_it_says_alone(few, alone):
    """After aborts, at any moment, and preemptions, of requests that share pages."""
    random, engine = Random(0), few.engine
    asked, said, dropped, written_to = {}, {}, set(), 0
    while len(asked) < 70 or engine.busy:
        while len(asked) < 70 and random.random() < (0.1 if len(asked) < 30 else 0.6):
            which = random.randrange(len(alone))
            prompt, params = PROMPTS[which // len(PARAMS)], PARAMS[which % len(PARAMS)]
            asked[number := len(asked)], said[number] = which, ()
            engine.add(Request(number, prompt, params, (), 0))
        for update in engine.step():
            said[update.request.id] += update.tokens
        running = [one for one in engine.scheduler.running.values() if one.in_flight]
        if running and random.random() < 0.3:
            one = random.choice(running)
            written_to += unfinished(engine)
            dropped.add(one.request.id)
            engine.abort(one.request.id)
    for number, which in asked.items():
        expected = alone[which]
        assert said[number] == (expected[: len(said[number])] if number in dropped else expected)
    assert written_to > 5
    assert engine.counters.preemptions > 5
    assert engine.metrics.prefix_hit_rate > 0.1
    assert_clean(few)


def test_each_program_consumes_the_cache_that_the_one_before_it_left(few, monkeypatch):
    """This is why pages may be given back before what writes to them has run: no later program can run before it."""
    programs, left, ran = few.engine.runner.programs, [few.engine.runner.cache], []

    def chained(name):
        run = getattr(programs, name)

        def call(params, state, cache, *given, **named):
            assert cache is left[-1]
            consumed = jax.tree.leaves(cache)
            state, cache, output = run(params, state, cache, *given, **named)
            assert all(array.is_deleted() for array in consumed)
            left.append(cache)
            ran.append(name)
            return state, cache, output

        monkeypatch.setattr(programs, name, call)

    for name in ("step", "loop", "verify"):
        chained(name)
    few.generate([list(prompt) for prompt in PROMPTS], PARAMS[0])
    assert set(ran) == {"step", "loop"}
    assert_clean(few)

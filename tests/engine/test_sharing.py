"""Greedy output is the same alone, in any batch, with and without sharing, chunks and preemption, token for token.

The engines share the programs of the session's one; what differs is the host's part.
"""

from dataclasses import replace
from random import Random

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Engine, Request
from jaxinfer.engine.paging import PagePool
from tests.engine.fake import Told, gather, run
from tests.engine.tiny import EOS, OPTIONS, TRACES, warm_llm

COMMON = tuple(range(5, 47))
SEEDED = SamplingParams(temperature=0.9, top_k=40, presence_penalty=0.4, repetition_penalty=1.2, max_tokens=30)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    llm = warm_llm(tmp_path_factory.getbasetemp())
    yield llm
    assert dict(llm.engine.runner.programs.traces) == TRACES


def engine(llm, pages: int | None = None, **changes) -> Engine:
    """One of its own cache, and of so many pages of every group, which the session's compiled programs run.

    What nobody wrote must not be read.
    """
    made = Engine(llm.model, llm.engine.runner.params, replace(OPTIONS, **changes))
    assert made.layout == llm.engine.layout
    made.runner.cache = jax.tree.map(lambda array: jnp.full_like(array, jnp.nan), made.runner.cache)
    made.runner.programs, made._warm = llm.engine.runner.programs, llm.engine._warm
    if pages is not None:
        made.scheduler.paging.pools = tuple(PagePool(pages) for _ in made.layout.num_pages)
    return made


def requests(random: Random) -> list[Request]:
    """Prompts of 1 to 60 tokens, most with a beginning in common."""
    made = []
    for number in range(14):
        prompt = COMMON[: random.choice([0, 8, 15, 42])] + tuple(random.choices(range(90), k=random.randint(1, 18)))
        greedy = SamplingParams(temperature=0.0, max_tokens=random.randint(1, 36), ignore_eos=True)
        params = random.choice([greedy, greedy, SEEDED])
        made.append(Request(number, prompt, params, (EOS,), seed=number))
    return made


def alone(llm, asked: list[Request]) -> Told:
    told: Told = {}
    one = engine(llm, enable_prefix_caching=False)
    for request in asked:
        one.add(request)
        run(one, told)
    return told


@pytest.mark.parametrize("seed", range(4))
def test_random_arrivals_change_no_token(llm, seed):
    random = Random(seed)
    asked = requests(random)
    expected = alone(llm, asked)
    seen = set()
    for sharing in (True, False):
        for pages, budget in ((14, 64), (None, 7), (14, 20)):
            several, told = engine(llm, pages, enable_prefix_caching=sharing), {}
            several.budget.most = budget
            for request in asked:
                several.add(request)
                for _ in range(random.choice([0, 0, 1, 3])):
                    gather(told, several.step())
            run(several, told)
            assert told == expected
            seen |= {"shared"} if several.counters.prefix_hits else set()
            seen |= {"preempted"} if several.counters.preemptions else set()
    assert seen == {"shared", "preempted"}


def test_preempted_log_probabilities_are_told_once(llm):
    """Those of a prompt too, although it is computed again."""
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    asked = [Request(number, COMMON[number:], params, (), 0) for number in range(3)]
    updates = {}
    for pages in (None, 14):
        several = engine(llm, pages)
        for request in asked:
            several.add(request)
        updates[pages] = {request.id: ([], [], []) for request in asked}
        while several.busy:
            for update in several.step():
                tokens, logprobs, prompt = updates[pages][update.request.id]
                tokens += update.tokens
                logprobs += update.logprobs
                prompt += update.prompt_logprobs or ()
        assert bool(several.counters.preemptions) == (pages is not None)
    for request in asked:
        plain, preempted = (updates[pages][request.id] for pages in (None, 14))
        assert preempted[0] == plain[0]
        assert len(plain[1]) == 30
        assert len(plain[2]) == len(request.prompt_ids)
        for before, after in zip(plain[1] + plain[2][1:], preempted[1] + preempted[2][1:], strict=True):
            assert before.token == after.token
            assert after.logprob == pytest.approx(before.logprob, abs=2e-5)  # float32, summed in another order


@pytest.mark.parametrize("programs", [1, 2, 3])
@pytest.mark.parametrize("same", [False, True])
def test_what_a_dropped_request_held_serves_the_next_while_programs_that_name_it_are_in_flight(llm, programs, same):
    """Those were dispatched before, and run before: another prompt overwrites the pages, the same one finds them."""
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    prompts = COMMON, COMMON if same else COMMON[::-1]
    dropped, asked = (Request(number, prompt, greedy, (EOS,), 0) for number, prompt in enumerate(prompts))
    one, told = engine(llm, pages=8), {}
    one.add(dropped)
    for _ in range(programs):
        gather(told, one.step())
    (sequence,) = one.scheduler.running.values()
    held = [set(pages) for pages in sequence.pages]
    assert sequence.in_flight > 0
    one.abort(dropped.id)
    assert [pool.used for pool in one.scheduler.paging.pools] == [0, 0]
    one.add(asked)
    gather(told, one.step())
    (sequence,) = one.scheduler.running.values()
    assert all(before & set(pages) for before, pages in zip(held, sequence.pages, strict=True))
    assert bool(one.counters.prefix_hits) == same
    run(one, told)
    assert told[asked.id] == alone(llm, [asked])[asked.id]
    assert told.get(dropped.id, ([], None))[1] is None

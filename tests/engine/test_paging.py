"""Whatever is asked for, in whatever order: no page is used twice or lost, and every request gets its own tokens."""

import dataclasses
from collections import Counter
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxinfer.cache import NULL_PAGE
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.structured_params import StructuredOutputsParams
from jaxinfer.engine import Engine, Options, Request
from jaxinfer.engine.pages import PagePool
from tests.engine.fake import FakeTimes, Told, expected_tokens, fake_engine, gather, run

CONTEXT = 144
OPTIONS = Options(
    max_num_seqs=4, max_num_batched_tokens=64, page_size=4, num_pages=21, max_slowdown=2.0, steps_per_dispatch=3
)
# No limit, prompts that stretch a step to twice its time soon or late, and such that always do.
TIMES = (None, FakeTimes(1.0, 0.005, 1e-4), FakeTimes(1.0, 0.001, 1e-4), FakeTimes(0.0, 1.0, 1.0))
POOL = settings(max_examples=50, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow])
ENGINE = settings(max_examples=60, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow])


class Pool(RuleBasedStateMachine):
    """A pool against lists of who holds which page, and of what was written there."""

    def __init__(self):
        super().__init__()
        self.pool, self.held, self.texts, self.written = PagePool(10), [], {}, 0

    @rule(count=st.integers(0, 9))
    def allocate(self, count):
        if count > self.pool.available:
            with pytest.raises(AssertionError):
                self.pool.allocate(count)
            return
        for page in self.pool.allocate(count):
            self.held.append(page)
            self.texts.pop(page, None)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def name(self, data):
        page = data.draw(st.sampled_from(self.held))
        if page not in self.texts:
            self.written += 1
            self.texts[page] = b"%d" % self.written
            self.pool.name(page, self.texts[page])

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def share(self, data):
        key = b"%d" % data.draw(st.integers(1, self.written))
        page = self.pool.find(key)
        assert page == next((page for page, text in self.texts.items() if text == key), None)
        if page is not None:
            self.pool.share(page)
            self.held.append(page)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data):
        page = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.give_back([page])
        if page not in self.held:
            with pytest.raises(AssertionError):
                self.pool.give_back([page])

    @invariant()
    def every_page_is_in_one_place(self):
        assert NULL_PAGE not in self.held
        assert set(self.held) <= set(range(10))
        for page in range(10):
            assert self.pool.users(page) == self.held.count(page)
        assert self.pool.used == len(set(self.held))
        assert self.pool.used + self.pool.available == self.pool.usable == 9
        self.pool.check()


def test_the_page_that_was_used_longest_ago_is_taken_first():
    pool = PagePool(4)
    pages = pool.allocate(3)
    for page in pages:
        pool.name(page, b"%d" % page)
    pool.give_back([pages[1], pages[0], pages[2]])
    pool.share(pages[1])
    pool.give_back([pages[1]])
    assert pool.allocate(1) == [pages[0]]
    assert pool.allocate(1) == [pages[2]]
    assert pool.find(b"%d" % pages[1]) == pages[1]


def assert_exact(engine: Engine) -> None:
    """Everybody is in one place, and so is every page: users are those who run, each with what its windows see."""
    scheduler, paging = engine.scheduler, engine.scheduler.paging
    assert all(sequence.slot == slot < OPTIONS.max_num_seqs for slot, sequence in scheduler.running.items())
    places = [*scheduler.waiting, *scheduler.running.values()]
    assert len({sequence.request.id for sequence in places}) == len(places)
    assert {sequence.request.id for sequence in places} <= set(scheduler.sequences)
    assert [s.rank for s in scheduler.waiting] == sorted(s.rank for s in scheduler.waiting)
    for sequence in scheduler.sequences.values():
        sequence.check()
    for group in range(len(paging.windows)):
        held = [s.pages[group][s.first[group] :] for s in scheduler.running.values()]
        users = Counter(page for pages in held for page in pages)
        assert all(len(set(pages)) == len(pages) for pages in held)
        assert paging.sharing or max(users.values(), default=0) <= 1
        for rank, pool in enumerate(paging.pools_of(group)):
            own = range(rank * (pool.usable + 1), (rank + 1) * (pool.usable + 1))
            assert users[own.start + NULL_PAGE] == 0
            assert [pool.users(page) for page in own] == [users.pop(page, 0) for page in own]
            assert paging.sharing or pool.cached == 0
            pool.check()
        assert not users, "pages that no pool has"
        assert all(len(pages) <= paging.most(group, CONTEXT, OPTIONS.max_num_batched_tokens) for pages in held)


def assert_idle(engine: Engine) -> None:
    scheduler = engine.scheduler
    assert (scheduler.sequences, scheduler.waiting, scheduler.running) == ({}, [], {})
    assert all(pool.used == 0 for pool in scheduler.paging.pools)
    assert not any(slot.active for slot in engine.runner.state)


def assert_told(told: Told, request: Request, aborted: bool = False) -> None:
    """Every token, once; of a request that was dropped as many as came before."""
    (tokens, ended), expected = told.get(request.id, ([], None)), expected_tokens(request)
    if aborted:
        assert ended is None
        assert tokens == expected[: len(tokens)]
    else:
        assert tokens == expected
        assert ended == ("stop" if tokens[-1] in request.stop_ids else "length")


class Requests(RuleBasedStateMachine):
    """An engine, with prompts that begin alike, that all kinds of things happen to."""

    @initialize(
        sharing=st.booleans(), pages=st.sampled_from([19, 24, 40]), times=st.sampled_from(TIMES),
        ranks=st.sampled_from([1, 1, 2, 4]),
    )  # fmt: skip
    def start(self, sharing, pages, times, ranks):
        options = dataclasses.replace(OPTIONS, enable_prefix_caching=sharing, num_pages=-(-pages // ranks) + 1)
        self.engine = fake_engine(options, CONTEXT, times=times, ranks=ranks)
        self.requests, self.told, self.aborted = [], {}, set()
        self.add(shift=False, common=24, own=(9,), new=20, stops=False, priority=0, n=4)

    @rule(
        shift=st.booleans(), common=st.sampled_from([0, 3, 8, 24, 31, 40]), own=st.sampled_from([(9,), (9, 8, 7, 6)]),
        new=st.integers(1, 20), stops=st.booleans(), priority=st.sampled_from([0, 0, 0, -1, 1]), n=st.integers(1, 4),
        bound=st.booleans(),
    )  # fmt: skip
    def add(self, shift, common, own, new, stops, priority, n, bound=False):
        for seed in range(n):
            prompt = (*range(shift, shift + common), *own)
            self.requests.append(request(len(self.requests), prompt, new, stops, seed, priority, bound and stops))
            self.engine.add(self.requests[-1])

    @rule(times=st.integers(1, 5))
    def step(self, times):
        for _ in range(times):
            gather(self.told, self.engine.step())

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        number = data.draw(st.integers(0, len(self.requests) - 1))
        if self.told.get(number, ([], None))[1] is None:
            self.aborted.add(number)
        self.engine.abort(number)

    @invariant()
    def all_is_accounted_for(self):
        assert_exact(self.engine)

    def teardown(self):
        if hasattr(self, "engine"):
            run(self.engine, self.told)
            assert_idle(self.engine)
            for each in self.requests:
                assert_told(self.told, each, each.id in self.aborted)


@pytest.mark.parametrize(("sharing", "ranks"), [(True, 1), (False, 1), (True, 3)])
def test_requests_of_random_arrivals(sharing, ranks, monkeypatch):
    """Many more, and longer, than the machine above tries; among them everything that can happen."""
    preemptions, hits, evictions, dropped = 0, 0, 0, 0
    for seed in range(30):
        random = Random(seed)
        monkeypatch.setattr("jaxinfer.engine.engine.IN_FLIGHT", random.choice([1, 2, 4]))
        pages = random.choice([36, 43, 89]) // ranks + 1
        options = dataclasses.replace(OPTIONS, enable_prefix_caching=sharing, num_pages=pages)
        engine = fake_engine(options, CONTEXT, times=random.choice(TIMES), ranks=ranks)
        requests, told, aborted = [], {}, set()
        engine.budget.most = random.choice([3, 17, 64])
        while len(requests) < 40:
            stops, priority = random.random() < 0.5, random.choice([0, 0, 0, 1])
            prompt = random_prompt(random, requests)
            for n in range(random.choice([1, 1, 1, 4])):
                new, bound = random.randint(1, 48), stops and random.random() < 0.3
                requests.append(request(len(requests), prompt, new, stops, n, priority, bound))
                engine.add(requests[-1])
            for _ in range(random.choice([0, 1, 1, 2, 8])):
                gather(told, engine.step())
                assert_exact(engine)
            if engine.scheduler.running and random.random() < 0.2:
                sequence = random.choice([*engine.scheduler.running.values()])
                dropped += sequence.in_flight > 0
                aborted.add(sequence.request.id)
                engine.abort(sequence.request.id)
                assert_exact(engine)  # its pages are free, whatever is in flight
        run(engine, told)
        assert_idle(engine)
        for each in requests:
            assert_told(told, each, each.id in aborted)
        preemptions += engine.counters.preemptions
        hits += engine.counters.prefix_hits
        evictions += engine.metrics.evictions
    assert preemptions > 100
    assert dropped > 50
    assert (hits > 1000, evictions > 1000) == (sharing, sharing)


def random_prompt(random: Random, requests: list[Request]) -> tuple[int, ...]:
    """One that begins like others, or goes on where another request ended."""
    if requests and random.random() < 0.3:
        earlier = random.choice(requests)
        text = (*earlier.prompt_ids, *expected_tokens(earlier), *range(random.choice([1, 5])))
        if len(text) < CONTEXT - 48:
            return text
    shift, common = random.choice([0, 1]), random.choice([0, 7, 8, 30, 64, 71])
    return (*range(shift, shift + common), *range(random.choice([1, 1, 4, 20])))


def request(number, prompt, new, stops=False, seed=0, priority=0, bound=False) -> Request:
    asked = StructuredOutputsParams(choice=["what the fake constraint allows"]) if bound else None
    stop_ids = [0, 1, 2] if stops else None
    params = SamplingParams(max_tokens=new, stop_token_ids=stop_ids, ignore_eos=not stops, structured_outputs=asked)
    return Request(number, prompt, params, (7,), seed, priority)


TestPool = Pool.TestCase
TestPool.settings = POOL
TestRequests = Requests.TestCase
TestRequests.settings = ENGINE

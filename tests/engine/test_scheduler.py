"""Pages and slots on the host: whatever is asked for, in whatever order, nothing is given out twice or lost."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxinfer.cache import NULL_PAGE
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.step import Layout
from jaxinfer.engine import Request
from jaxinfer.engine.pages import PagePool
from jaxinfer.engine.scheduler import Chunk, Scheduler, lay_out, next_tokens

FEW = settings(max_examples=30, stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow])
LAYOUT = Layout(slots=4, page_size=4, num_pages=(9, 13), max_tokens=32, cache_dtype="float32")


class Pool(RuleBasedStateMachine):
    """A pool against the set of pages that are out."""

    def __init__(self):
        super().__init__()
        self.pool, self.out = PagePool(10), []

    @rule(count=st.integers(0, 9))
    def allocate(self, count):
        if count > self.pool.free:
            with pytest.raises(AssertionError):
                self.pool.allocate(count)
        else:
            self.out.append(self.pool.allocate(count))

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def give_back(self, data):
        self.pool.give_back(self.out.pop(data.draw(st.integers(0, len(self.out) - 1))))

    @precondition(lambda self: self.pool.free)
    @rule()
    def give_back_twice(self):
        pages = self.pool.allocate(1)
        self.pool.give_back(pages)
        with pytest.raises(AssertionError):
            self.pool.give_back(pages)

    @invariant()
    def every_page_is_in_one_place(self):
        held = [page for pages in self.out for page in pages]
        assert NULL_PAGE not in held
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(10))
        assert self.pool.free + len(held) == self.pool.usable == 9


class Schedule(RuleBasedStateMachine):
    """The scheduler driven as an engine would, without a device."""

    def __init__(self):
        super().__init__()
        self.scheduler, self.submitted, self.admitted = Scheduler(LAYOUT), 0, []

    @rule(prompt=st.integers(1, 20), new=st.integers(1, 12))
    def submit(self, prompt, new):
        params = SamplingParams(max_tokens=new)
        self.scheduler.add(Request(self.submitted, (7,) * prompt, params, (), 0))
        self.submitted += 1

    @rule()
    def admit(self):
        while (sequence := self.scheduler.admit()) is not None:
            self.admitted.append(sequence.request.id)

    @rule(budget=st.integers(1, 16))
    def prefill(self, budget):
        chunks = self.scheduler.chunks(budget)
        assert sum(chunk.tokens for chunk in chunks) <= budget
        left = sum(sequence.prompt_left for sequence in self.scheduler.running.values())
        assert sum(chunk.tokens for chunk in chunks) == min(left, budget)
        for chunk in chunks:
            assert chunk.start == chunk.sequence.prefilled
            chunk.sequence.prefilled += chunk.tokens

    @rule(steps=st.integers(1, 5))
    def decode(self, steps):
        for sequence in self.scheduler.decoding():
            assert sequence.prompt_left == 0
            sequence.scheduled += steps

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def finish(self, data):
        slot = data.draw(st.sampled_from(sorted(self.scheduler.running)))
        self.scheduler.finish(self.scheduler.running[slot])

    @invariant()
    def pages_belong_to_one_sequence(self):
        for group, pool in enumerate(self.scheduler.pools):
            held = [page for s in self.scheduler.running.values() for page in s.pages[group]]
            assert len(set(held)) == len(held)
            assert NULL_PAGE not in held
            assert pool.free + len(held) == pool.usable

    @invariant()
    def pages_hold_the_longest_outcome(self):
        for slot, sequence in self.scheduler.running.items():
            assert sequence.slot == slot < LAYOUT.slots
            assert all(len(pages) * LAYOUT.page_size >= sequence.request.capacity for pages in sequence.pages)
            sequence.check()

    @invariant()
    def first_come_first_served(self):
        assert self.admitted == list(range(len(self.admitted)))


TestPool = Pool.TestCase
TestPool.settings = FEW
TestSchedule = Schedule.TestCase
TestSchedule.settings = FEW


def test_chunks_are_laid_out_one_after_the_other():
    scheduler = Scheduler(Layout(4, 4, (33,), 32, "float32"))
    prompts = [(1, 2, 3, 4, 5), (6, 7), (8, 9, 10, 11)]
    for index, prompt in enumerate(prompts):
        scheduler.add(Request(index, prompt, SamplingParams(), (), 0))
    first, second, third = [scheduler.admit() for _ in prompts]
    chunks = [Chunk(first, 2, 3), Chunk(second, 0, 2), Chunk(third, 1, 2)]
    prefill = lay_out(chunks, 8, 4)
    assert prefill.tokens_T.tolist() == [3, 4, 5, 6, 7, 9, 10, 0]
    assert prefill.starts_R1.tolist() == [0, 3, 5, 7, 7]
    assert prefill.slots_R.tolist() == [0, 1, 2, 4]
    assert prefill.lengths_R.tolist() == [5, 2, 3, 0]
    assert prefill.last_R.tolist() == [1, 1, 0, 0]
    assert next_tokens(chunks, 8).tolist() == [4, 5, -1, 7, -1, 10, 11, -1]
    packed = prefill.packed()
    assert packed.dtype == np.int32
    for sent, got in zip(vars(prefill).values(), vars(prefill.unpacked(packed, 8)).values(), strict=True):
        np.testing.assert_array_equal(sent, got)

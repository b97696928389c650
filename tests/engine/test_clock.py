"""What programs took is told where it is known, and nowhere else."""

from functools import partial
from types import SimpleNamespace

from jaxinfer.decode.sampling import GREEDY
from jaxinfer.engine import warm_up
from jaxinfer.engine.clock import DeviceClock
from jaxinfer.engine.costs import ENOUGH


class Output:
    """An array that is there at once, or at a certain time."""

    def __init__(self, clock: list[float], done: float | None = None):
        self.clock, self.done = clock, done

    def is_ready(self):
        return self.done is None

    def block_until_ready(self):
        if self.done is not None:
            self.clock[0] = self.done
        return self


def test_the_time_between_two_programs_that_were_waited_for():
    now = [0.0]
    clock = DeviceClock(lambda: now[0])
    told = [clock.wait([Output(now, done)]) for done in (1.0, 3.0, 3.5)]
    assert told == [None, 2.0, 0.5]


def test_of_a_program_that_was_done_before_nothing_is_known_nor_of_the_next():
    now = [0.0]
    clock = DeviceClock(lambda: now[0])
    told = [clock.wait([Output(now, done), Output(now)]) for done in (1.0, None, 7.0, 8.0)]
    assert told == [None, None, None, 1.0]


def test_the_first_after_a_pause_is_not_known():
    now = [0.0]
    clock = DeviceClock(lambda: now[0])
    clock.wait([Output(now, 1.0)])
    clock.idle()
    assert clock.wait([Output(now, 5.0)]) is None
    assert clock.wait([Output(now, 6.0)]) == 1.0


def test_what_the_host_checks_takes_from_one_reading_to_the_next():
    """Whether or not the device was waited for: the host's part is in it."""
    now = [0.0]
    clock = DeviceClock(lambda: now[0])
    assert clock.wait([Output(now, 1.0)], checked=True) is None
    now[0] = 5.0
    assert clock.wait([Output(now)], checked=True) == 4.0
    assert clock.wait([Output(now, 7.0)], checked=True) == 2.0
    assert clock.wait([Output(now, 8.0)]) == 1.0
    clock.idle()
    assert clock.wait([Output(now, 9.0)], checked=True) is None


def test_the_loops_of_a_warm_engine_are_timed(monkeypatch):
    """As often as corrects a prediction: of every rectangle, plain and with each number of proposed tokens."""
    now, done, told, runs = [0.0], [0.0], [], []
    monkeypatch.setattr(warm_up, "DeviceClock", partial(DeviceClock, lambda: now[0]))

    def loop(slots_B, needs, drafts):
        runs.append(drafts)
        assert now[0] < done[0] or len(runs) == 1  # the device has something to do
        assert needs == GREEDY
        assert (slots_B == 8).all()  # no slot of the eight
        done[0] += len(slots_B) + 4 * drafts
        return [Output(now, done[0])]

    runner = SimpleNamespace(layout=SimpleNamespace(slots=8), steps=4, loop=loop)
    gate = SimpleNamespace(weighed=(0, 1, 2), time=lambda *what: told.append(what))
    warm_up.time_loops(runner, GREEDY, gate)
    kinds = [(size, drafts) for size in (1, 8) for drafts in (0, 1, 2)]
    assert told == [([1] * size, drafts, size / 4 + drafts) for size, drafts in kinds for _ in range(ENOUGH)]
    assert len(runs) == len(told) + 1

"""What programs took is told where it is known, and nowhere else."""

from jaxinfer.engine.clock import DeviceClock


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

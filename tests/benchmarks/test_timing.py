"""How a call is timed: what the program holds, what passes through the cache between two calls on one copy."""

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.kernels import timing
from benchmarks.kernels.op import Run
from benchmarks.kernels.timing import (
    CALLS,
    MOST_BYTES,
    Effort,
    Started,
    make_copies,
    make_program,
    num_copies,
    start,
    time_call,
)

PRODUCT = Run(lambda arguments: arguments["x"] @ arguments["w"])


def random_product(key: jax.Array) -> dict[str, jax.Array]:
    x_key, w_key = jax.random.split(key)
    return {"x": jax.random.normal(x_key, (4, 64)), "w": jax.random.normal(w_key, (64, 32))}


def started(run: Run) -> Started:
    """Compiled, for random products."""
    return start(run, jax.eval_shape(random_product, jax.random.key(0)), ThreadPoolExecutor(1))


@pytest.mark.parametrize("l2", [1, 50e6, 126e6])
@pytest.mark.parametrize("copy_bytes", [10_000, 4_194_304, 33_554_432, 33_600_000, 100_000_000, 500_000_000])
def test_twice_the_cache_passes_between_two_calls_on_a_copy(copy_bytes, l2):
    copies = num_copies(copy_bytes, l2)
    assert (copies - 1) * copy_bytes >= 2 * l2
    assert copies >= 2
    assert CALLS % copies == 0 or copies % CALLS == 0  # every program is a whole number of turns
    fewer = [n for n in range(2, copies) if CALLS % n == 0 or n % CALLS == 0]
    assert all((n - 1) * copy_bytes < 2 * l2 for n in fewer)


def test_one_copy_does_where_two_are_too_large_for_the_memory():
    assert num_copies(MOST_BYTES // 2, 50e6) == 2
    assert num_copies(MOST_BYTES // 2 + 1, 50e6) == 1


def test_copies_differ_and_are_enough():
    copies = make_copies(started(PRODUCT), random_product, l2=20_000)  # of 4 * (4 + 32) * 64 = 9216 bytes each
    assert len(copies) == 10
    assert len({float(copy["w"][0, 0]) for copy in copies}) == 10


def test_copies_are_prepared():
    half = Run(PRODUCT.call, lambda arguments: arguments | {"w": arguments["w"][:, :16]})
    assert {copy["w"].shape for copy in make_copies(started(half), random_product, l2=1)} == {(64, 16)}


def test_a_program_makes_all_calls():
    """Also where every call gets the same copy, nothing is merged, dropped or copied."""
    copies = make_copies(started(PRODUCT), random_product, l2=1)
    window = [copies[0]] * (CALLS - 1) + [copies[1]]
    for expected, output in zip(window, make_program(PRODUCT)(window), strict=True):
        np.testing.assert_allclose(output, expected["x"] @ expected["w"], rtol=1e-6, atol=1e-6)
    entry = jax.jit(make_program(PRODUCT)).lower(window).compile().as_text().partition("ENTRY")[2]
    # A product may have become a fusion or a call of a library.
    products = re.findall(r"= f32\[4,32\]\S* (?!parameter|tuple|get-tuple-element|bitcast)[\w-]+\(", entry)
    assert len(products) == CALLS
    assert not re.findall(r"= f32\[64,32\]\S* copy\(", entry)


def test_each_call_waits_for_the_one_before():
    """Barrier n takes the arguments of call n and the output of call n - 1."""
    copies = make_copies(started(PRODUCT), random_product, l2=1)
    jaxpr = jax.make_jaxpr(make_program(PRODUCT))([copies[0]] * CALLS).jaxpr
    calls = [equation for equation in jaxpr.eqns if equation.primitive.name in ("jit", "pjit")]
    barriers = [equation for equation in jaxpr.eqns if equation.primitive.name == "optimization_barrier"]
    assert (len(calls), len(barriers)) == (CALLS, CALLS - 1)
    for previous, barrier, call in zip(calls[:-1], barriers, calls[1:], strict=True):
        assert previous.outvars[0] in barrier.invars
        assert set(call.invars) <= set(barrier.outvars)
    assert jaxpr.outvars == [call.outvars[0] for call in calls]


def passed(monkeypatch, num: int, effort: Effort) -> tuple[list[int], timing.Timing]:
    """The copies that `time_call` passes to calls, in order, and what it makes of a clock of one second a sample."""
    seen, clock = [], iter(range(10**6))

    def program(calls, window):
        assert len(window) == calls
        seen.extend(copy["n"] for copy in window)
        return window

    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(timing.jax, "block_until_ready", lambda outputs: outputs)
    whole, single = (partial(program, calls) for calls in (CALLS, 1))
    found = time_call(whole, lambda: single, [{"n": n} for n in range(num)], effort, lambda output: None)
    return seen, found


@pytest.mark.parametrize("num", [1, 2, 5, 20, 40, 60])
def test_copies_take_turns_from_program_to_program(monkeypatch, num):
    seen, found = passed(monkeypatch, num, Effort(samples=4, seconds=3.0, most_seconds=1e9))
    programs = -(-max(3, num // CALLS) // max(1, num // CALLS)) * max(1, num // CALLS)
    samples = seen[2 * CALLS :]  # after the programs that compile and that show how long one takes
    assert len(samples) == 4 * programs * CALLS
    assert samples == [n % num for n in range(len(samples))]
    assert found.median == found.low == found.high == pytest.approx(1 / (programs * CALLS))


def test_the_output_of_the_first_copy_is_checked():
    copies, outputs = make_copies(started(PRODUCT), random_product, l2=1), []
    run = started(PRODUCT)
    found = time_call(run.program.result(), run.compile_single, copies, Effort(samples=5, seconds=0), outputs.append)
    np.testing.assert_allclose(outputs[0], copies[0]["x"] @ copies[0]["w"], rtol=1e-6, atol=1e-6)
    assert 0 < found.low <= found.median <= found.high
    assert jnp.isfinite(found.median)


@pytest.mark.parametrize(("most_seconds", "calls"), [(10.0, CALLS), (9.9, 19), (1.0, 2), (0.5, 1), (0.0, 1)])
def test_what_is_slow_gets_fewer_calls_in_a_sample_and_as_many_samples(monkeypatch, most_seconds, calls):
    """By this clock the first program takes a second."""
    seen, found = passed(monkeypatch, 3, Effort(10, seconds=0.02, most_seconds=most_seconds))
    assert found.samples == 10
    assert found.median == 1 / calls
    before = 2 * CALLS + (calls < CALLS)  # what compiles, and what shows how long a call takes
    assert len(seen) == before + 10 * calls
    if calls < CALLS:
        assert seen[before:] == [n % 3 for n in range(10 * calls)]


def test_a_long_call_is_timed_alone():
    copies, run = make_copies(started(PRODUCT), random_product, l2=1), started(PRODUCT)
    effort = Effort(samples=10, seconds=0, most_seconds=0)
    found = time_call(run.program.result(), run.compile_single, copies, effort, lambda output: None)
    assert found.samples == 10
    assert 0 < found.low <= found.median <= found.high

"""What speculation brings: the formulas, their edges, and what is predicted of an 8B model on an H100."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.roofline import (
    MEASURED,
    Verification,
    decode_step,
    independent,
    tokens_per_step,
    verification,
)

H100 = MEASURED["h100-measured"]


@given(acceptance=st.floats(0, 0.999), drafts=st.integers(0, 127))
def test_tokens_of_independent_proposals(acceptance, drafts):
    expected = (1 - acceptance ** (drafts + 1)) / (1 - acceptance)
    assert tokens_per_step(independent(acceptance, drafts)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("acceptance", "tokens"), [(0.0, 1), (1.0, 9)])
def test_proposals_that_are_never_or_always_right(acceptance, tokens):
    assert tokens_per_step(independent(acceptance, 8)) == tokens


def test_tokens_of_proposals_that_get_worse():
    assert tokens_per_step([0.9, 0.5, 0.25, 0.25]) == pytest.approx(2.9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: independent(1.5, 2), r"acceptance is 1\.5; it must be in 0\.\.1"),
        (lambda: independent(-0.1, 2), r"acceptance is -0\.1; it must be in 0\.\.1"),
        (lambda: independent(0.5, -1), "drafts is -1; it must be at least 0"),
        (
            lambda: tokens_per_step([0.5, 0.6]),
            r"accepted is \[0\.5, 0\.6\]; it must fall from at most 1 to at least 0",
        ),
        (lambda: tokens_per_step([1.1]), r"accepted is \[1\.1\]"),
        (lambda: tokens_per_step([0.5, -0.1]), r"accepted is \[0\.5, -0\.1\]"),
    ],
)
def test_what_is_no_acceptance_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_verification_is_two_decode_steps_and_the_proposals(published):
    config = published("llama-3-8b")
    found = verification(config, H100, 4, 1000, 8, proposing=1e-3)
    assert found.plain == decode_step(config, 4, 1000).predict(H100)
    assert found.verifying == decode_step(config, 4, 1008, queries=9).predict(H100) + 1e-3
    assert verification(config, H100, 4, 1000, 0).cost == 1


def test_the_speedup_is_tokens_over_cost():
    pair = Verification(plain=2e-3, verifying=5e-3)
    assert (pair.cost, pair.speedup(5)) == (2.5, 2)
    assert pair.speedup(tokens_per_step(independent(0, 8))) == pytest.approx(1 / 2.5)


def test_speculation_loses_in_large_batches(published):
    """Proposals are nearly free at batch 1; where arithmetic bounds the matmuls, each costs its part of a step."""
    config, tokens = published("llama-3-8b"), tokens_per_step(independent(0.6, 8))
    costs = {batch: verification(config, H100, batch, 256, 8).cost for batch in (1, 4, 16, 64, 256)}
    assert list(costs.values()) == sorted(costs.values())
    assert costs[1] < 1.02
    assert tokens / costs[1] > 2.4
    assert tokens / costs[256] < 0.7
    assert verification(config, H100, 256, 256, 8).speedup(9) > 1.9  # but for proposals that are always right

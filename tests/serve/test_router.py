"""Where the router sends prompts: what its policy promises, held against a record of whole texts of its own."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.serve.router import MARGIN, RATIO, SHARE, Replica, Router

PAGE = 16
SLOTS = 4
MANY = 10**6  # slots or pages that never run out
BEGINNINGS = [random.Random(seed).choices(range(4096), k=4096) for seed in range(3)]

# A prompt: whose beginning it has, how many tokens of it, tokens of its own, and how many continuations.
PROMPTS = st.tuples(st.integers(0, 2), st.integers(0, 4096), st.integers(1, 600), st.integers(1, 4))


def text(beginning: int, shared: int, own: int, seed: int) -> list[int]:
    return BEGINNINGS[beginning][:shared] + random.Random(f"{seed}").choices(range(4096), k=own)


def common(one: list[int], other: list[int]) -> int:
    """Tokens of the whole pages with which two texts begin alike."""
    tokens = 0
    while tokens + PAGE <= min(len(one), len(other)) and one[tokens : tokens + PAGE] == other[tokens : tokens + PAGE]:
        tokens += PAGE
    return tokens


def made(replicas: int = 2, slots: int = MANY, pages: int = MANY) -> Router:
    return Router([Replica(slots, pages) for _ in range(replicas)], PAGE)


def limit(least: float) -> float:
    return max(least + MARGIN, RATIO * least)


@settings(max_examples=60)
@given(st.integers(2, 4), st.lists(st.one_of(PROMPTS, st.integers(0, 99)), max_size=30))
def test_a_prompt_goes_where_its_beginning_is_unless_that_is_overloaded(replicas, arrivals):
    """A number among the prompts ends a continuation, if there is any."""
    router, texts, running = made(replicas, SLOTS), [[] for _ in range(replicas)], []
    for seed, arrival in enumerate(arrivals):
        if isinstance(arrival, int):
            if running:
                seat, ended = running.pop(arrival % len(running))
                router.leave(seat, ended)
            continue
        *parts, n = arrival
        prompt = text(*parts, seed)
        loads = [sum(seat.tokens for seat, _ in running if seat.replica == one) for one in range(replicas)]
        taken = [sum(seat.replica == one for seat, _ in running) for one in range(replicas)]
        assert [(replica.tokens, replica.sequences) for replica in router.replicas] == list(
            zip(loads, taken, strict=True)
        )
        free = [one for one in range(replicas) if taken[one] < SLOTS] or list(range(replicas))
        least = min(loads[one] for one in free)
        able = [one for one in free if loads[one] <= limit(least)]
        known = {one: max((common(prompt, earlier) for earlier in texts[one]), default=0) for one in able}
        longest = max(known.values())

        seats = router.place(prompt, n)
        (chosen,) = {seat.replica for seat in seats}
        assert len(seats) == n
        assert chosen in able
        if longest and longest >= SHARE * len(prompt):
            assert known[chosen] == longest
            assert loads[chosen] == min(loads[one] for one in able if known[one] == longest)
        else:
            assert loads[chosen] == least
        texts[chosen].append(prompt)
        for seat in seats:
            router.grow(seat, seed)
            running.append((seat, prompt))
    for seat, ended in running:
        router.leave(seat, ended)
    assert [(replica.tokens, replica.sequences) for replica in router.replicas] == [(0, 0)] * replicas


@given(st.integers(2, 5), st.lists(PROMPTS, min_size=1, max_size=30))
def test_loads_stay_within_the_margin(replicas, prompts):
    """But for one prompt, whatever prompts have in common."""
    router, largest = made(replicas), 0
    for seed, (*parts, n) in enumerate(prompts):
        prompt = text(*parts, seed)
        router.place(prompt, n)
        largest = max(largest, n * len(prompt))
        loads = [replica.tokens for replica in router.replicas]
        assert max(loads) <= limit(min(loads)) + largest


@given(st.integers(1, 40), st.lists(PROMPTS, min_size=1, max_size=20))
def test_no_more_is_remembered_than_a_cache_holds(pages, prompts):
    """The last text is, from its beginning on, as far as that goes."""
    router = made(pages=pages)
    for seed, (*parts, n) in enumerate(prompts):
        prompt = text(*parts, seed)
        for place in (router.place(prompt, n)[0], *router.place(prompt, 1)):
            replica = router.replicas[place.replica]
            assert max(len(one.known) for one in router.replicas) <= pages
            assert len(place.keys) == len(prompt) // PAGE
        assert replica.match(place.keys) == min(pages, len(place.keys))
        router.leave(place, [*prompt, *range(2 * PAGE)])
        assert max(len(one.known) for one in router.replicas) <= pages


def test_no_prompt_is_sent_to_wait_for_a_slot_while_another_replica_has_one():
    """However little runs where all slots are taken."""
    router = made(slots=2)
    seats = [router.place(text(0, 0, own, own))[0].replica for own in (4000, 10, 11, 12, 13)]
    assert seats == [0, 1, 1, 0, 1]


def test_how_much_more_a_replica_may_have_than_the_least():
    """`MARGIN` tokens where there is little to do, and half as much again where there is more."""
    for least in (0, 4 * MARGIN):
        for excess in (int(limit(least)) - least, int(limit(least)) - least + 1):
            router, prompt = made(), text(0, 160, 10, 0)
            (seat,) = router.place(prompt)
            router.grow(seat, least + excess - len(prompt))
            (other,) = router.place(text(1, 100, 10, 1))
            router.grow(other, least - 110)
            expected = other if router.replicas[seat.replica].tokens > limit(least) else seat
            assert router.place(prompt)[0].replica == expected.replica
            assert (excess > max(MARGIN, least // 2)) == (expected is other)


def test_a_conversation_stays_and_others_go_elsewhere():
    """An answer is known like a prompt: here it is most of what the next turn begins with."""
    router = made()
    prompt, answer, question = text(0, 100, 60, 1), text(1, 0, 400, 2), text(2, 0, 90, 3)
    (seat,) = router.place(prompt)
    router.leave(seat, prompt + answer)
    (other,) = router.place(text(1, 20, 10, 4))
    assert {seat.replica, other.replica} == {0, 1}  # of idle ones that which knows fewer pages
    router.leave(other, [])
    assert router.place(prompt + answer + question)[0].replica == seat.replica


def test_a_short_beginning_in_common_draws_nobody():
    """Where all prompts begin with one page, both replicas are used from the second on."""
    router = made()
    begins = [router.place(text(0, PAGE, 500, seed))[0].replica for seed in range(4)]
    assert begins == [0, 1, 0, 1]


def test_nothing_is_remembered_where_it_would_not_help():
    for router in (made(replicas=1), made(pages=0)):
        seats = [router.place(text(0, 160, 10, seed))[0] for seed in range(4)]
        assert [seat.keys for seat in seats] == [[]] * 4
        router.leave(seats[0], text(0, 160, 10, 0))
        assert [len(replica.known) for replica in router.replicas] == [0] * len(router.replicas)
        loads = [replica.tokens for replica in router.replicas]
        assert max(loads) - min(loads) <= 170

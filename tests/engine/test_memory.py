"""How the room for the cache is shared among groups."""

from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.engine.memory import share_room

GROUPS = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 1000)), min_size=1, max_size=4)


@given(room=st.integers(0, 100_000), groups=GROUPS)
def test_the_room_is_filled_equally_up_to_what_is_wanted(room, groups):
    sizes, wanted = [size for size, _ in groups], tuple(most for _, most in groups)
    counts = share_room(room, sizes, wanted)
    assert all(count <= most for count, most in zip(counts, wanted, strict=True))
    assert sum(count * size for count, size in zip(counts, sizes, strict=True)) <= room
    # One more of each that wants more would not fit.
    more = [count + (count < most) for count, most in zip(counts, wanted, strict=True)]
    used = sum(count * size for count, size in zip(more, sizes, strict=True))
    assert used > room or counts == wanted


def test_what_a_window_group_does_not_want_the_others_get():
    assert share_room(1000, [1, 1], (100, 10_000)) == (100, 900)
    assert share_room(1000, [1, 3], (10_000, 10_000)) == (250, 250)

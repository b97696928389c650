"""The sizes of programs."""

import pytest

from jaxinfer.engine.buckets import rectangle, rectangles


def test_rectangles_are_powers_of_two_and_halfway_between_large_ones():
    assert rectangles(512) == [1, 8, 32, 64, 128, 192, 256, 384, 512]
    assert rectangles(128) == [1, 8, 32, 64, 128]
    assert rectangles(4) == [1, 4]
    assert rectangles(1) == [1]


@pytest.mark.parametrize("slots", [1, 4, 64, 256])
def test_the_smallest_rectangle_with_room_is_taken(slots):
    for decoding in range(slots + 1):
        fitting = [size for size in rectangles(slots) if size >= decoding]
        assert rectangle(decoding, slots) == min(fitting)

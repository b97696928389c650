"""The few sizes that programs have: powers of two."""

from __future__ import annotations

from jaxinfer.engine.options import SMALLEST_BUCKET


def powers(least: int, most: int) -> list[int]:
    """The powers of two from `least` to `most`, both powers of two themselves."""
    return [least << shift for shift in range((most // least).bit_length())]


def bucket(count: int, least: int = SMALLEST_BUCKET) -> int:
    """The smallest power of two that is at least `count`, and at least `least`, a power of two itself."""
    return max(least, 1 << (count - 1).bit_length())


def rectangle(slots: list[int]) -> int:
    """Slots of a program of decode steps alone that reaches all of these."""
    return bucket(max(slots) + 1, 1)

"""Numbers among arguments. Python counts True and False as integers; here they are none. Needs no device."""

from __future__ import annotations

import math
import numbers
from typing import TypeGuard, cast


def is_integer(
    value: object, least: float = -math.inf, most: float = math.inf, kind: type = numbers.Integral
) -> TypeGuard[int]:
    """Whether it is an integer in `least`..`most`, of Python or of NumPy unless `kind` is narrower."""
    return isinstance(value, kind) and not isinstance(value, bool) and least <= cast("int", value) <= most


def is_size(value: object, least: int, most: float = math.inf) -> TypeGuard[int]:
    """Whether it is an integer in `least`..`most` that programs can be made of: Python's own, which others are not in
    all respects."""
    return is_integer(value, least, most, int)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number, which may be infinite or no number at all."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_size(name: str, value: object, least: int, most: int | None = None) -> None:
    """
    Raises:
        ValueError: it is no size in `least`..`most`, or at least `least`; names the argument.
    """
    if not is_size(value, least, math.inf if most is None else most):
        allowed = f", at least {least}" if most is None else f" in {least}..{most}"
        raise ValueError(f"{name} = {value!r} must be an integer{allowed}")

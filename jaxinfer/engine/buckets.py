"""The few sizes that programs have: powers of two, and of decode steps with many slots what lies halfway, too."""

from __future__ import annotations

from jaxinfer.engine.options import SMALLEST_BUCKET

FEW = 8  # rows of the smallest step without prompts
# A layer of Llama-3-8B takes an H100 137, 140 and 141 us with 1, 16 and 32 rows: little is lost between them.
SPARED = (2, 4, 16)
# The products of such a layer take an H200 125, 152, 169 and 201 us with 64, 128, 192 and 256 rows: from 128 on there
# are sizes halfway. With 72 they take 148 us, so that 96 would bring little.
MANY = 128


def powers(least: int, most: int) -> list[int]:
    """The powers of two from `least` to `most`, both powers of two themselves."""
    return [least << shift for shift in range((most // least).bit_length())]


def bucket(count: int, least: int = SMALLEST_BUCKET) -> int:
    """The smallest power of two that is at least `count`, and at least `least`, a power of two itself."""
    return max(least, 1 << (count - 1).bit_length())


def few(ranks: int) -> int:
    """Rows of the smallest step without prompts, two blocks of them for each device that shares a sequence."""
    return max(FEW, 2 * ranks)


def step_size(rows: int, prompts: bool, ranks: int = 1) -> int:
    """Rows of the step that computes so many, some of them of prompts or none."""
    return few(ranks) if rows <= few(ranks) and not prompts else bucket(rows)


def rectangles(slots: int) -> list[int]:
    """Slots of the programs of decode steps alone, in an engine of so many."""
    sizes = powers(1, slots)
    halfway = [size + size // 2 for size in sizes if MANY <= size < slots]
    return sorted(size for size in (*sizes, *halfway) if size not in SPARED or size == slots)


def rectangle(decoding: int, slots: int) -> int:
    """Slots of the program of decode steps alone that has room for so many."""
    return next(size for size in rectangles(slots) if size >= decoding)

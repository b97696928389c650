"""What the demo model is asked to go on with: texts that neither it nor what drafts for it was trained on."""

from __future__ import annotations

import itertools
import keyword
import re
from collections import Counter
from collections.abc import Iterator

from jaxinfer.text.tokenizer import Tokenizer
from jaxinfer.training.data import read_library

FILE, BEGUN = 384, 64  # tokens of a file, and of its edited copy, that stand in a prompt


def copies(tokenizer: Tokenizer, count: int) -> list[tuple[int, ...]]:
    """So many files of the standard library, each with the beginning of a copy in which a name is another one."""
    files = [tokenizer.encode(document.text) for document in read_library().held_out]
    pieces = itertools.chain.from_iterable(zip(*map(_pieces, files), strict=False))  # of each file by turns
    return [_edited(tokenizer, piece) for piece in itertools.islice(pieces, count)]


def beginnings(tokenizer: Tokenizer, length: int, apart: int) -> Iterator[tuple[int, ...]]:
    """So many tokens each from places in the files of the standard library."""
    for document in read_library().held_out:
        ids = tokenizer.encode(document.text)
        for at in range(length, len(ids) - length, apart):
            yield tuple(ids[at : at + length])


def _pieces(ids: list[int]) -> Iterator[list[int]]:
    for first in range(0, len(ids) - FILE, FILE):
        yield ids[first : first + FILE]


def _edited(tokenizer: Tokenizer, ids: list[int]) -> tuple[int, ...]:
    text = tokenizer.decode(ids)
    names = Counter(name for name in re.findall(r"[A-Za-z_]{4,}", text) if not keyword.iskeyword(name))
    old = names.most_common(1)[0][0]
    edited = re.sub(rf"\b{old}\b", new := f"new_{old}", text)
    begun = tokenizer.decode(tokenizer.encode(edited)[: BEGUN + 1])
    return tuple(tokenizer.encode(f"{text}\n\n\n# The same, with {new} in the place of {old}:\n\n{begun}"))

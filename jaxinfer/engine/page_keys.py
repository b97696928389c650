"""What a page of the cache is found by."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b


def extend_keys(keys: list[bytes], tokens: Sequence[int], page_size: int, pages: int) -> None:
    """Appends keys until the first `pages` pages of `tokens` have one each; all their tokens are known.

    The key of a page is a hash of its tokens and all before them. 32 bytes of BLAKE2b do not collide, by chance or on
    purpose.
    """
    for page in range(len(keys), pages):
        before = keys[-1] if keys else b"pages of %d tokens" % page_size
        text = array("i", tokens[page * page_size : (page + 1) * page_size]).tobytes()
        keys.append(blake2b(before + text, digest_size=32).digest())

"""Which pages of the cache are free, on the host."""

from __future__ import annotations

from jaxinfer.cache import NULL_PAGE


class PagePool:
    """The free pages of one cache group. The null page is never handed out."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        pages = (page for page in range(num_pages - 1, -1, -1) if page != NULL_PAGE)
        self._free = dict.fromkeys(pages)  # an ordered set: the last one freed goes out first

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def usable(self) -> int:
        """Pages that sequences can have together."""
        return self.num_pages - 1

    def allocate(self, count: int) -> list[int]:
        assert count <= self.free, (count, self.free)
        return [self._free.popitem()[0] for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        assert self._free.keys().isdisjoint(pages), pages
        self._free.update(dict.fromkeys(pages))

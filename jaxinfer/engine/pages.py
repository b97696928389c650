"""Which pages of the cache are free, on the host."""

from __future__ import annotations

from jaxinfer.cache import NULL_PAGE


class PagePool:
    """The free pages of one cache group. The null page is never handed out."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = [page for page in range(num_pages - 1, -1, -1) if page != NULL_PAGE]

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def usable(self) -> int:
        """Pages that sequences can have together."""
        return self.num_pages - 1

    def allocate(self, count: int) -> list[int]:
        assert count <= self.free, (count, self.free)
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        assert not set(pages) & set(self._free), pages
        self._free.extend(pages)

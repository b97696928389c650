"""Which pages of the cache are in use, by how many, and which hold text that may be asked for again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from jaxinfer.cache import NULL_PAGE


class PagePool:
    """The pages of one cache group that one device has, or devices that have the same. The null page, the first of
    them, is never handed out.

    A page is in one of three places: in use, by one sequence or several; cached, where nobody uses it but its text
    has a key by which it is found; or empty. A cached page is taken away when no empty one is left, the one first
    that was used longest ago.
    """

    def __init__(self, num_pages: int, first: int = 0):
        """
        Args:
            num_pages: the null page included.
            first: the number of the first page.
        """
        self.usable = num_pages - 1  # pages that sequences can have together
        self.evictions = 0  # cached pages that were taken away
        self._empty = [first + page for page in range(num_pages - 1, -1, -1) if page != NULL_PAGE]
        self._cached: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self._users: dict[int, int] = {}
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out."""
        return len(self._empty) + len(self._cached)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def used(self) -> int:
        return len(self._users)

    def users(self, page: int) -> int:
        return self._users.get(page, 0)

    def allocate(self, count: int) -> list[int]:
        """Pages whose content is of no worth, each with one user."""
        assert 0 <= count <= self.available, (count, self.available)
        pages = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        self._users.update(dict.fromkeys(pages, 1))
        self.check()
        return pages

    def find(self, key: bytes) -> int | None:
        """The page with the text of that key, if there is one."""
        return self._page_of.get(key)

    def share(self, page: int) -> None:
        """Gives a page that was found one more user."""
        assert page in self._key_of, page
        self._cached.pop(page, None)
        self._users[page] = self.users(page) + 1
        self.check()

    def name(self, page: int, key: bytes) -> None:
        """Lets a page be found, from now on unchanged. Of two pages with the same text the first is found."""
        assert page in self._users, page
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def give_back(self, pages: Iterable[int]) -> None:
        """Takes one user from each page; of those that nobody uses then, the first is the first to be taken away."""
        for page in pages:
            assert page in self._users, page
            self._users[page] -= 1
            if self._users[page] == 0:
                del self._users[page]
                if page in self._key_of:
                    self._cached[page] = None
                else:
                    self._empty.append(page)
        self.check()

    def check(self) -> None:
        """Every page is in one place."""
        counts = len(self._empty), len(self._cached), len(self._users)
        assert sum(counts) == self.usable, (counts, self.usable)
        assert len(self._page_of) == len(self._key_of), (len(self._page_of), len(self._key_of))

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        self.evictions += 1
        del self._page_of[self._key_of.pop(page)]
        return page

"""Which pages of every cache group a sequence has: they come as it grows, are shared where texts begin alike, and go
back as they leave the window.

No page that others use is ever written, so none is ever copied. A page can be found only when all of its tokens are
known and a dispatched program writes them; a sequence that finds pages goes on after them, in pages of its own. It
computes its last known token itself, and with it the rest of that page, if the page would be full: fewer tokens than
one page has, in a step that has to run anyway.

Programs run on the device in the order of dispatch, since each consumes the cache that the one before it left. A page
may therefore be found as soon as the program that fills it is scheduled, in that very program even (every layer writes
before it reads), and given back as soon as no program yet to be scheduled reads or writes it. Those in flight that do,
of a request that was dropped, preempted or ended meanwhile, run before its next owner's, who reads no key that it, or
whoever named the page, has not written: what they leave there is never seen. The slot of such a request is released
before the next program, so that none writes for it again.

Where several devices share a sequence, page j of it comes from the pool of rank j mod c. Pages of all ranks have
numbers of their own, so that a page table names them without their ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

from jaxinfer.cache import NULL_PAGE
from jaxinfer.decode.layout import Layout
from jaxinfer.engine.pages import PagePool
from jaxinfer.engine.sequence import Sequence
from jaxinfer.roofline import most_pages


class Paging:
    """The pages of all cache groups.

    Attributes:
        windows: of the cache groups, None where all keys are seen.
        sharing: whether pages can be found.
        ranks: devices that share a sequence.
        pools: of every cache group that of each rank, in this order.
    """

    def __init__(self, layout: Layout, windows: tuple[int | None, ...], sharing: bool):
        self.page_size, self.windows, self.sharing = layout.page_size, windows, sharing
        self.ranks = layout.ranks
        each = [(count // layout.ranks, rank) for count in layout.num_pages for rank in range(layout.ranks)]
        self.pools = tuple(PagePool(count, rank * count) for count, rank in each)

    def pool(self, group: int, column: int) -> PagePool:
        """That a column of a sequence's pages comes from."""
        return self.pools[group * self.ranks + column % self.ranks]

    def pools_of(self, group: int) -> tuple[PagePool, ...]:
        return self.pools[group * self.ranks : (group + 1) * self.ranks]

    def on_rank(self, rank: int, columns: range) -> int:
        """How many of these columns a rank has."""
        return (columns.stop - rank - 1) // self.ranks - (columns.start - rank - 1) // self.ranks

    def usable(self, group: int) -> int:
        """Pages that a sequence can have alone, which come from all ranks in turn."""
        return sum(pool.usable for pool in self.pools_of(group))

    def columns(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def most(self, group: int, tokens: int, ahead: int) -> int:
        """Pages of a group that a sequence has at once; see `most_pages`."""
        return most_pages(tokens, self.page_size, self.windows[group], ahead)

    # --- growth

    def reach(self, sequence: Sequence, length: int) -> int:
        """How many of its first `length` tokens a sequence could have pages for."""
        begin = sequence.columns
        # The first column of a rank from there on, and one for every page that the rank has available.
        ends = [
            begin + (nth % self.ranks - begin) % self.ranks + self.ranks * pool.available
            for nth, pool in enumerate(self.pools)
        ]
        return min(length, min(ends) * self.page_size)

    def grow(self, sequence: Sequence, length: int) -> bool:
        """Gives a sequence the pages of its first `length` tokens; False if there are not enough."""
        missing = range(sequence.columns, self.columns(length))
        if not missing:
            return True
        needed = [self.on_rank(rank, missing) for rank in range(self.ranks)]
        if any(needed[nth % self.ranks] > pool.available for nth, pool in enumerate(self.pools)):
            return False
        for group, pages in enumerate(sequence.pages):
            new = [iter(pool.allocate(count)) for count, pool in zip(needed, self.pools_of(group), strict=True)]
            pages += [next(new[column % self.ranks]) for column in missing]
        return True

    def give_back_unseen(self, sequence: Sequence) -> None:
        """Takes the pages of which every key is out of the window of the next query, and so of all later ones.

        The device's page table keeps them: all implementations of attention skip, or mask, what is out of the window.
        """
        for group, window in enumerate(self.windows):
            if window is None:
                continue
            first = max(sequence.length - window + 1, 0) // self.page_size
            if first > sequence.first[group]:
                unseen = range(sequence.first[group], first)
                self._take_back(sequence, group, unseen)
                sequence.pages[group][unseen.start : unseen.stop] = [NULL_PAGE] * len(unseen)
                sequence.first[group] = first

    def give_back(self, sequence: Sequence) -> None:
        """Takes all pages; the last ones are taken away first, since fewer texts have them in common."""
        for group, first in enumerate(sequence.first):
            self._take_back(sequence, group, reversed(range(first, sequence.columns)))
        sequence.pages = ()

    def _take_back(self, sequence: Sequence, group: int, columns: Iterable[int]) -> None:
        """Of these columns, in this order."""
        of_rank: list[list[int]] = [[] for _ in range(self.ranks)]
        for column in columns:
            of_rank[column % self.ranks].append(sequence.pages[group][column])
        for pool, pages in zip(self.pools_of(group), of_rank, strict=True):
            pool.give_back(pages)

    # --- sharing

    def found(self, sequence: Sequence) -> int:
        """Columns with which a sequence could begin: in every group their pages can be found, those at least that
        the token after them sees."""
        if not self.sharing or sequence.scores_prompt:
            return 0
        found, runs = 0, [0] * len(self.windows)
        for column in range((len(sequence.tokens) - 1) // self.page_size):
            key = sequence.key(column, self.page_size)
            runs = [run + 1 if self.pool(group, column).find(key) is not None else 0 for group, run in enumerate(runs)]
            if not all(run or window for run, window in zip(runs, self.windows, strict=True)):
                break  # a group that sees all keys has a gap
            seen = [column + 1 - self._first_seen(group, column + 1) for group in range(len(runs))]
            if all(run >= least for run, least in zip(runs, seen, strict=True)):
                found = column + 1
        return found

    def costs(self, sequence: Sequence, found: int, ahead: int) -> list[int]:
        """Available pages that each pool loses in all to a sequence that begins with `found` columns."""
        costs = []
        for group in range(len(self.windows)):
            first = self._first_seen(group, found)
            columns = range(first, first + self.most(group, len(sequence.tokens), ahead))
            of_rank = [self.on_rank(rank, columns) for rank in range(self.ranks)]
            for column in range(first, found):
                pool = self.pool(group, column)
                page = pool.find(sequence.key(column, self.page_size))
                of_rank[column % self.ranks] -= page is not None and pool.users(page) > 0
            costs += of_rank
        return costs

    def to_come(self, sequence: Sequence, ahead: int) -> list[int]:
        """Pages of every pool that a sequence has yet to get: those of what is left of its text, if any, and one."""
        counts = []
        for group in range(len(self.windows)):
            left = self.most(group, sequence.goal, ahead) - sequence.columns + sequence.first[group]
            columns = range(sequence.columns, sequence.columns + (max(left, 0) if sequence.prompt_left else 0) + 1)
            counts += [self.on_rank(rank, columns) for rank in range(self.ranks)]
        return counts

    def begin(self, sequence: Sequence, found: int) -> None:
        """Gives a sequence that has no pages yet the first columns, which were `found`."""
        for group in range(len(self.windows)):
            first = sequence.first[group] = self._first_seen(group, found)
            sequence.pages[group].extend([NULL_PAGE] * first)
            for column in range(first, found):
                pool = self.pool(group, column)
                page = pool.find(sequence.key(column, self.page_size))
                assert page is not None, (group, column, sequence)
                pool.share(page)
                sequence.pages[group].append(page)
        sequence.prefilled, sequence.named = found * self.page_size, found

    def name(self, sequence: Sequence, length: int) -> None:
        """Lets the full pages among a sequence's first `length` tokens, all of them known, be found."""
        if not self.sharing:
            return
        for column in range(sequence.named, length // self.page_size):
            key = sequence.key(column, self.page_size)
            for group, pages in enumerate(sequence.pages):
                if column >= sequence.first[group]:
                    self.pool(group, column).name(pages[column], key)
        sequence.named = max(sequence.named, length // self.page_size)

    def _first_seen(self, group: int, columns: int) -> int:
        """The first column that the token after so many columns sees."""
        window = self.windows[group]
        return 0 if window is None else max(columns * self.page_size - window + 1, 0) // self.page_size

    # --- accounting

    def waste(self, sequences: list[Sequence]) -> int:
        """Slots of pages in use, over all groups, that hold no token and will get none from a dispatched program."""
        return sum(
            len(sequence.pages[group]) * self.page_size - sequence.length
            for sequence in sequences
            for group in range(len(self.windows))
        )

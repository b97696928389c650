"""Which replica of the engine continues a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxinfer.engine.page_keys import extend_keys

MARGIN = 8192  # tokens by which a load may exceed the least: SGLang's 64 requests, of 128 tokens each,
RATIO = 1.5  # or times the least that it may be, where that is more
SHARE = 0.3  # of a prompt that a replica must know for that to count


@dataclass(eq=False)
class Replica:
    """What the HTTP process knows of a replica, which tells nothing for this.

    Attributes:
        slots: sequences that it runs at once.
        pages: that its cache has; 0 where prompts do not share them.
        tokens: its load: of the continuations that run or wait there, their prompts and what came of them.
        sequences: how many these are.
        known: keys of pages that its cache most likely has, the least recently used first; at most `pages`.
    """

    slots: int
    pages: int
    tokens: int = 0
    sequences: int = 0
    known: dict[bytes, None] = field(default_factory=dict)

    def match(self, keys: Sequence[bytes]) -> int:
        """How many pages in a row it knows, from the first on."""
        return next((page for page, key in enumerate(keys) if key not in self.known), len(keys))

    def remember(self, keys: Sequence[bytes]) -> None:
        """Takes the pages of a text as used now; the first one last, since more texts begin with it."""
        for key in reversed(keys):
            self.known.pop(key, None)
            self.known[key] = None
        while len(self.known) > self.pages:
            del self.known[next(iter(self.known))]


@dataclass(eq=False)
class Seat:
    """A continuation in its replica.

    Attributes:
        replica: by number.
        tokens: of the load, those that are its own.
        keys: of the full pages of its prompt.
    """

    replica: int
    tokens: int
    keys: list[bytes]


class Router:
    """Gives each prompt to the replica that has most of it in its cache, unless that one is overloaded.

    The policy is the cache-aware one of SGLang's router (LMSYS, "SGLang v0.4", December 2024, and `cache_aware.rs` of
    github.com/sgl-project/sglang), with its numbers where they are ratios. Loads are tokens where it counts requests,
    and prefixes are looked for by the keys of the engine's pages where it has a radix tree of texts:

    1. The load of a replica is the number of tokens that the continuations there have, in prompts and outputs: what
       it keeps, or has yet to compute, and reads at every step. Of equal loads the one counts less that knows fewer
       pages.
    2. A replica is overloaded if its load is more than `MARGIN` tokens above the least, and more than `RATIO` times
       the least. Where any replica has a free slot, those that have none are overloaded too, and the least load is
       that of the others: no prompt is sent to wait where another would run it now.
    3. Of the replicas that are not, the prompt goes to the one that knows the longest prefix of it, in whole pages, if
       that is at least `SHARE` of the prompt; of several such to the least loaded. Otherwise to the least loaded.
    4. What a replica was given, and later what came of it, it knows from then on, as many pages as its cache has; the
       least recently used are forgotten first, as they are there. So turns of a conversation and prompts that begin
       alike meet their pages again. The n continuations of a prompt stay together.
    """

    def __init__(self, replicas: Sequence[Replica], page_size: int):
        self.replicas, self._page_size = replicas, page_size
        self._keeps_keys = len(replicas) > 1 and any(replica.pages for replica in replicas)

    @property
    def slots(self) -> int:
        """Sequences that run at once, in all replicas."""
        return sum(replica.slots for replica in self.replicas)

    def place(self, prompt: Sequence[int], n: int = 1) -> list[Seat]:
        """Seats for the n continuations of a prompt, in one replica."""
        keys = self._keys(prompt, [])
        chosen = self._choose(keys, len(prompt))
        chosen.remember(keys)
        chosen.tokens += n * len(prompt)
        chosen.sequences += n
        return [Seat(self.replicas.index(chosen), len(prompt), keys) for _ in range(n)]

    def grow(self, seat: Seat, tokens: int) -> None:
        """So many tokens came of a continuation."""
        seat.tokens += tokens
        self.replicas[seat.replica].tokens += tokens

    def leave(self, seat: Seat, text: Sequence[int]) -> None:
        """A continuation has ended or is dropped; `text` is its prompt and what came of it."""
        replica = self.replicas[seat.replica]
        replica.tokens -= seat.tokens
        replica.sequences -= 1
        replica.remember(self._keys(text, seat.keys))

    def _choose(self, keys: Sequence[bytes], tokens: int) -> Replica:
        open_ones = [replica for replica in self.replicas if replica.sequences < replica.slots] or self.replicas
        least = min(open_ones, key=lambda replica: (replica.tokens, len(replica.known)))
        most = max(least.tokens + MARGIN, RATIO * least.tokens)
        able = [replica for replica in open_ones if replica.tokens <= most]
        best = max(able, key=lambda replica: (replica.match(keys), -replica.tokens))
        known = best.match(keys) * self._page_size
        return best if known and known >= SHARE * tokens else least

    def _keys(self, text: Sequence[int], first: Sequence[bytes]) -> list[bytes]:
        """Keys of all full pages of a text, of which the first are given."""
        keys = list(first)
        if self._keeps_keys:
            extend_keys(keys, text, self._page_size, len(text) // self._page_size)
        return keys

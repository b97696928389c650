"""What is asked for: prompts of random tokens, and how many tokens each request is to get."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """One request.

    Attributes:
        prompt: token ids.
        output: tokens to generate; no stop ends them earlier.
    """

    prompt: tuple[int, ...]
    output: int


@dataclass(frozen=True)
class Workload:
    """Sizes of requests that are repeatable everywhere.

    Attributes:
        sizes: tokens in and out of each request.
        shared: tokens at the beginning that all prompts have in common.
    """

    sizes: tuple[tuple[int, int], ...]
    shared: int = 0

    def jobs(self, vocabulary: int, seed: int = 0) -> list[Job]:
        """The requests, with prompts drawn evenly from the vocabulary."""
        rng = random.Random(seed)
        draw = lambda count: tuple(rng.randrange(vocabulary) for _ in range(count))  # noqa: E731
        common = draw(self.shared)
        return [Job(common + draw(prompt - len(common)), output) for prompt, output in self.sizes]

    def first(self, count: int) -> Workload:
        """So many of the requests, from the beginning again where there are fewer."""
        repeated = self.sizes * -(-count // len(self.sizes))
        return Workload(repeated[:count], self.shared)


def mixed(count: int, low: int = 100, high: int = 1024) -> Workload:
    """Lengths in and out drawn evenly, as other systems are measured: `random.seed(0)`, in and out by turns."""
    rng = random.Random(0)
    return Workload(tuple((rng.randint(low, high), rng.randint(low, high)) for _ in range(count)))


def chats(count: int, prompt: float = 161, output: float = 338, most: int = 1024) -> Workload:
    """Lengths as people chat: exponential around the means of ShareGPT, `most` in and out at most (Kwon et al. 2023,
    "Efficient Memory Management for Large Language Model Serving with PagedAttention", section 6.1)."""
    rng = random.Random(0)

    def length(mean: float) -> int:
        return min(math.ceil(rng.expovariate(1 / mean)), most)

    return Workload(tuple((length(prompt), length(output)) for _ in range(count)))


WORKLOADS = {
    "256 requests": mixed(256),
    "256 short requests": mixed(256, low=16, high=256),  # for a model of a short context, such as the demo's
    "1024 requests": mixed(1024),
    "1024 chats": chats(1024),
    "32 x 8192 in, 64 out": Workload(((8192, 64),) * 32),
    "64 x 2048 in, of them 1920 shared, 128 out": Workload(((2048, 128),) * 64, shared=1920),
}


def longest(workloads: Sequence[Workload], static: Sequence[Workload] = ()) -> int:
    """Tokens of the longest sequence, in and out.

    Args:
        static: those that are also batched statically, where each sequence may become as long as the others' output.
    """
    alone = [prompt + output for workload in workloads for prompt, output in workload.sizes]
    together = [sum(map(max, zip(*workload.sizes, strict=True))) for workload in static]
    return max([*alone, *together], default=0)

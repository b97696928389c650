"""How an engine runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxinfer.cache import CACHE_DTYPES
from jaxinfer.decode.arguments import check_size, is_number, is_size
from jaxinfer.decode.speculative import METHODS, Speculation, beyond_of, depth_of
from jaxinfer.decode.step import SCORED

SMALLEST_BUCKET = SCORED  # the larger ones are whole multiples: one program scores all prompts
# Least and most of each: what is beyond serves nobody, and would take its time to fail.
POWERS = {
    "max_num_seqs": (1, 4096),
    "page_size": (1, 4096),
    "max_num_batched_tokens": (SMALLEST_BUCKET, 2**20),
}
MOST_STEPS = 1024
IN_FLIGHT = 2  # programs dispatched before the oldest is read


@dataclass(frozen=True)
class Options:
    """How an engine runs, in vLLM's names where it has them.

    Attributes:
        max_num_seqs, page_size, max_num_batched_tokens: sequences that run at once, tokens per page of the cache, and
            tokens of one step that has prompts in it, those of sequences that decode included, so more than there
            are sequences; powers of two in the ranges of POWERS.
        num_pages: pages of each cache group, the null page included, on each of the devices that share a sequence;
            None gives every slot its longest sequence, as far as memory goes.
        max_slowdown: how many times as long as a decode step alone a program may take, by prediction, that prefills
            beside sequences that decode: at least 1. No limit, the default, is best for throughput; where somebody
            waits for single tokens, `jaxinfer serve` has 1.75. See `jaxinfer.engine.budget`.
        steps_per_dispatch: decode steps in one program, at most MOST_STEPS.
        cache_dtype: of keys and values, one of CACHE_DTYPES; None takes the model's. In int8 and float8_e4m3fn every
            key and value of a head has a float32 scale of its own.
        enable_prefix_caching: texts that begin alike share the pages of their common beginning.
        speculation: a method of `jaxinfer.decode.speculative`, which decode steps without prompts beside them use;
            None decodes plainly. Outputs are the same, or by the method's choice other draws of the same distribution.
        always_speculate: also where plain decoding is predicted to be faster; by default nothing is proposed there, as
            `jaxinfer.engine.gate` says.
        adaptive_speculation: proposals have at most the method's `num_speculative_tokens`, and before every program of
            decode steps the gate chooses how many, of that and the powers of two below it. Only of a method that
            proposes tokens one after the other.
        max_waiting_time: seconds after its arrival at which a request that has not begun to run ends with the reason
            `timeout`; None lets it wait.
    """

    max_num_seqs: int = 8
    max_num_batched_tokens: int = 1024
    page_size: int = 16
    num_pages: int | None = None
    max_slowdown: float = math.inf
    steps_per_dispatch: int = 8
    cache_dtype: str | None = None
    enable_prefix_caching: bool = True
    speculation: Speculation | None = None
    always_speculate: bool = False
    adaptive_speculation: bool = False
    max_waiting_time: float | None = None

    def __post_init__(self):
        for name, (least, most) in POWERS.items():
            value = getattr(self, name)
            if not is_size(value, least, most) or value & (value - 1):
                raise ValueError(f"{name} = {value!r} must be an integer power of two in {least}..{most}")
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens = {self.max_num_batched_tokens} must be more than max_num_seqs = "
                f"{self.max_num_seqs}: each sequence that decodes takes one of them"
            )
        check_size("steps_per_dispatch", self.steps_per_dispatch, 1, MOST_STEPS)
        if not is_number(self.max_slowdown) or not self.max_slowdown >= 1:
            raise ValueError(f"max_slowdown = {self.max_slowdown!r} must be a number, at least 1")
        if self.cache_dtype not in (None, *CACHE_DTYPES):
            raise ValueError(f"cache_dtype = {self.cache_dtype!r} must be one of {', '.join(CACHE_DTYPES)}")
        if self.num_pages is not None and not is_size(self.num_pages, 2):
            raise ValueError(f"num_pages = {self.num_pages!r} must be an integer, at least 2, the null page included")
        if self.speculation is not None and not isinstance(self.speculation, Speculation):
            raise ValueError(f"speculation = {self.speculation!r} must be a method of speculation, or None")
        for name in ("enable_prefix_caching", "always_speculate", "adaptive_speculation"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} = {value!r} must be True or False")
        if self.adaptive_speculation and not (self.speculation and self.speculation.adapts):
            able = ", ".join(method.__name__ for method in METHODS.values() if method.adapts)
            raise ValueError(
                f"adaptive_speculation = True has no use where speculation = {self.speculation!r}; that must be a "
                f"method that proposes tokens one after the other, one of {able}"
            )
        if self.max_waiting_time is not None and not _is_duration(self.max_waiting_time):
            raise ValueError(f"max_waiting_time = {self.max_waiting_time!r} must be seconds above 0, or None")

    @property
    def most_ahead(self) -> int:
        """Tokens of the next program, and those before it that a sequence may have in the cache or not."""
        return self.steps_per_dispatch * (1 + depth_of(self.speculation) * IN_FLIGHT) + beyond_of(self.speculation)


def _is_duration(value: object) -> bool:
    return is_number(value) and 0 < value < math.inf

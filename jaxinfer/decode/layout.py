"""The static sizes of what an engine keeps on the device, which its programs are compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from jaxinfer.decode.speculative import Pool, Speculation, beyond_of, depth_of, drafts_of
from jaxinfer.model import Model


@dataclass(frozen=True)
class Layout:
    """The static sizes of an engine's device state.

    Attributes:
        slots: sequences that run at once.
        page_size: tokens per page.
        num_pages: pages of each cache group, the null page included; with several ranks of all of these, each with a
            null page of its own.
        max_tokens: tokens of the longest sequence, prompt and output.
        cache_dtype: of keys and values, one of `jaxinfer.cache.CACHE_DTYPES`.
        attention: the implementation of attention, by its name in `pallas_kernels`; by default chosen by hardware
            and input.
        speculation: what loops of decode steps may propose; None for plain decoding.
        adaptive: whether they may propose fewer tokens than that says, see `choices`. Only of a method that adapts.
        ranks: devices that share every sequence, whose pages are dealt out to them, one after the other.
    """

    slots: int
    page_size: int
    num_pages: tuple[int, ...]
    max_tokens: int
    cache_dtype: str
    attention: str = "auto"
    speculation: Speculation | None = None
    adaptive: bool = False
    ranks: int = 1

    @property
    def drafts(self) -> int:
        """Tokens that a decode step proposes for each slot."""
        return drafts_of(self.speculation)

    @property
    def depth(self) -> int:
        """How many of these may be right: of a tree, those of its longest path."""
        return depth_of(self.speculation)

    @property
    def choices(self) -> tuple[int, ...]:
        """How many proposed tokens may be right in a step of a loop that proposes, from few to many: `depth`, and of
        a layout that adapts the powers of two below it."""
        if not self.depth:
            return ()
        fewer = [1 << shift for shift in range((self.depth - 1).bit_length())] if self.adaptive else []
        return (*fewer, self.depth)

    def method(self, drafts: int) -> Speculation:
        """What proposes in steps in which so many proposed tokens may be right, one of `choices`."""
        assert self.speculation is not None
        assert drafts in self.choices, drafts
        return self.speculation if drafts == self.depth else self.speculation.fewer(drafts)

    @property
    def beyond(self) -> int:
        """Tokens by which a slot needs more pages for proposals than for the longest text that they may bring."""
        return beyond_of(self.speculation)

    @property
    def pages_per_row(self) -> int:
        """With room for what is proposed after the last token."""
        return -(-(self.max_tokens + self.drafts) // self.page_size)

    @property
    def text(self) -> int | None:
        """Tokens that are kept of each slot; None if none are."""
        return self.max_tokens if self.speculation is not None and self.speculation.reads_text else None


def pools_of(model: Model, speculation: Speculation | None) -> list[Pool]:
    """The layers of a cache: the model's, of a stage where a pipe divides them, then those of a method."""
    sizes = (model.kv_slots, model.kv_slots_per_device, model.config.head_size, model.stages)
    own = [Pool(model.config.group(layer), *sizes) for layer in range(model.per_stage)]
    return own if speculation is None else own + speculation.pools(model)

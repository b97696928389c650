"""What a method of speculation is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax

from jaxinfer.decode.slots import SlotState

MOST_DRAFTS = 127  # the decode kernel takes 128 queries of a sequence


@runtime_checkable
class Speculation(Protocol):
    """A method with its settings: hashable, since programs are compiled for it.

    Attributes:
        num_speculative_tokens: k, proposed for each sequence in each step, 1..MOST_DRAFTS.
    """

    @property
    def num_speculative_tokens(self) -> int: ...

    def propose(self, state: SlotState) -> jax.Array:
        """The tokens that may follow the newest one of each slot, int32 [B, k]; any for a slot that is not active."""
        ...


def drafts_of(speculation: Speculation | None) -> int:
    """Tokens that a decode step proposes for each slot: none without a method."""
    return 0 if speculation is None else speculation.num_speculative_tokens


def check_drafts(count: object) -> None:
    """
    Raises:
        ValueError: it is no number of tokens that can be proposed.
    """
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_DRAFTS:
        raise ValueError(f"num_speculative_tokens = {count!r} must be an integer in 1..{MOST_DRAFTS}")

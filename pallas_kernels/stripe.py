"""Sequences whose pages are dealt out to several ranks, one after the other, so that each sees a stripe of the keys
(Brandon et al. 2023, "Striped Attention", section 3, of pages instead of tokens)."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stripe:
    """Column i of a page table is page i x `ranks` + `rank` of its sequence, and key l of the row a key of that page.

    Attributes:
        rank: int32 scalar, 0..ranks - 1.
        ranks: at least 1.
    """

    rank: jax.Array
    ranks: int = field(metadata={"static": True})

    def position(self, key: jax.Array, page_size: int) -> jax.Array:
        """Where in their sequences keys of a row are."""
        return (key // page_size * self.ranks + self.rank) * page_size + key % page_size

    def columns(self, pages: jax.Array) -> jax.Array:
        """How many of the first so many pages of a sequence are here."""
        return (pages - self.rank + self.ranks - 1) // self.ranks

    def keys(self, tokens: jax.Array, page_size: int) -> jax.Array:
        """How many of the first so many tokens of a sequence are here: those before them in a row."""
        whole = tokens // page_size
        last_is_here = whole % self.ranks == self.rank
        return self.columns(whole) * page_size + jnp.where(last_is_here, tokens % page_size, 0)


def key_positions(table_BJ: jax.Array, page_size: int, stripe: Stripe | None) -> jax.Array:
    """Where in their sequences the keys of a row are that its columns name, [1, C]."""
    key_1C = jnp.arange(table_BJ.shape[1] * page_size, dtype=jnp.int32)[None]
    return key_1C if stripe is None else stripe.position(key_1C, page_size)

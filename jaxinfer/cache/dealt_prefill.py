"""Of pages that are dealt out to ranks: attention of the ragged prefill, whose rows are spread over the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxinfer.cache.dealt_decode import decoded
from jaxinfer.cache.pages import Pages, View
from jaxinfer.cache.rank import Rank
from jaxinfer.cache.store import store
from jaxinfer.parallel import CONTEXT, context
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.parts import Part, merged


def prefill(rank: Rank, q_TNH: jax.Array, tokens: Pages, pages: Pages) -> tuple[Part, Pages]:
    """Of a step with prompts in it, beside which slots may decode. All keys are written before a page is read: a
    sequence may begin with pages that another one fills in this very step."""
    chunks = Chunks(rank.view, len(q_TNH) // 2, rank.stripe.ranks)
    nothing = Part(jnp.zeros_like(q_TNH, jnp.float32), jnp.full(q_TNH.shape[:2], -jnp.inf, jnp.float32))

    def meet(found: tuple[Part, Pages], tokens: Pages, owner: jax.Array) -> tuple[Part, Pages]:
        part, pages = found
        pages = store(pages, rank.places(chunks.rows_of(owner, rank.view.write_T), pages), tokens)
        return merged(part, _among_chunks(rank, chunks, q_TNH, tokens, owner)), pages

    def look_back(block: tuple[jax.Array, Part], owner: jax.Array) -> tuple[jax.Array, Part]:
        q_TNH, part = block
        return q_TNH, merged(part, _before_chunks(rank, chunks, q_TNH, pages, owner))

    part, pages = context.visit(meet, (nothing, pages), tokens)
    _, part = context.travel(look_back, (q_TNH, part), jnp.any(chunks.before_R > 0))
    if len(rank.view.decode_lengths_B):
        part = merged(part, _decoding(rank, chunks, q_TNH, tokens, pages))
    return part, pages


@dataclass(frozen=True)
class Chunks:
    """The rows of a step as the ranks have them: two blocks of `block` rows each."""

    view: View
    block: int
    ranks: int

    @property
    def starts_R1(self) -> jax.Array:
        return self.view.prefill_starts_R1

    @property
    def before_R(self) -> jax.Array:
        """Keys that each sequence had before its chunk."""
        return jnp.maximum(self.view.prefill_lengths_R - jnp.diff(self.starts_R1), 0)

    def first_rows(self, rank: jax.Array) -> tuple[jax.Array, jax.Array]:
        return context.first_rows(2 * self.block * self.ranks, rank, self.ranks)

    def rows_of(self, rank: jax.Array, x_T: jax.Array) -> jax.Array:
        """What belongs to a rank's rows, of all rows in their order."""
        blocks = [jax.lax.dynamic_slice_in_dim(x_T, first, self.block) for first in self.first_rows(rank)]
        return jnp.concatenate(blocks)

    def within(self, first: jax.Array) -> jax.Array:
        """The borders of the sequences, each moved into the block of rows that begins there."""
        return jnp.clip(self.starts_R1, first, first + self.block)

    def borders(self, firsts: list[jax.Array]) -> jax.Array:
        """`cu_q` of some blocks one after the other. The rows of each behind its last sequence are one more."""
        inner = [nth * self.block + self.within(first) - first for nth, first in enumerate(firsts)]
        return jnp.concatenate([*inner, jnp.full(1, len(firsts) * self.block, jnp.int32)])


def _one_more(x_R: jax.Array) -> jax.Array:
    """With a zero for the rows behind the last sequence of a block."""
    return jnp.pad(x_R, ((0, 1),) + ((0, 0),) * (x_R.ndim - 1))


# The blocks of a rank's rows, 0 in front of 1, and those of the keys that come, which its rows may see under a causal
# mask: whoever is the first of two ranks, the later block of its keys is behind the earlier block of the other's rows.
_MEETING = ((0, 0), (1, 0), (1, 1))


def _among_chunks(rank: Rank, chunks: Chunks, q_TNH: jax.Array, tokens: Pages, owner: jax.Array) -> Part:
    """Of a rank's rows over the keys of the owner's rows. A token is a page, and the pages of a sequence are those of
    its tokens in one of the two blocks."""
    own, others, h = chunks.first_rows(rank.stripe.rank), chunks.first_rows(owner), chunks.block
    tables, lengths, there = [], [], []
    for mine, theirs in _MEETING:
        q_R1, k_R1 = chunks.within(own[mine]), chunks.within(others[theirs])
        first_R, keys_R = k_R1[:-1], jnp.diff(k_R1)
        sees_R = (jnp.diff(q_R1) > 0) & (keys_R > 0) & (rank.view.prefill_lengths_R > 0)
        at_R = first_R - others[theirs] + theirs * h
        tables.append(_one_more(jnp.minimum(at_R[:, None] + jnp.arange(h, dtype=jnp.int32)[None], 2 * h - 1)))
        lengths.append(_one_more(jnp.where(sees_R, jnp.maximum(q_R1[1:] - first_R, 0), 0)))
        there.append(_one_more(keys_R))
    part = rank.attended(
        flash_attention, jnp.concatenate([q_TNH[:h], q_TNH[h:], q_TNH[h:]]), tokens, jnp.concatenate(tables),
        chunks.borders([own[mine] for mine, _ in _MEETING]), jnp.concatenate(lengths),
        kv_lengths_R=jnp.concatenate(there), anywhere=True,
    )  # fmt: skip
    early, later, latest = (jax.tree.map(lambda x, nth=nth: x[nth * h : (nth + 1) * h], part) for nth in range(3))
    return jax.tree.map(lambda *blocks: jnp.concatenate(blocks), early, merged(later, latest))


def _before_chunks(rank: Rank, chunks: Chunks, q_TNH: jax.Array, pages: Pages, owner: jax.Array) -> Part:
    """Of the owner's rows over the rank's pages of what came before their chunks."""
    firsts, before_R = chunks.first_rows(owner), chunks.before_R
    table_RJ = _one_more(rank.table(rank.view.prefill_tables_RJ, pages))
    stripe = None
    if rank.window is None:  # each row sees all there is, as rows do that are behind it
        here_R = rank.stripe.keys(before_R, pages.k_PSKH.shape[1])
    else:
        stripe, here_R = rank.stripe, before_R
    lengths = []
    for first in firsts:
        q_R1 = chunks.within(first)
        ahead_R = jnp.diff(q_R1) if stripe is None else q_R1[1:] - chunks.starts_R1[:-1]
        sees_R = (jnp.diff(q_R1) > 0) & (before_R > 0)
        lengths.append(_one_more(jnp.where(sees_R, here_R + ahead_R, 0)))
    return rank.attended(
        flash_attention, q_TNH, pages, jnp.concatenate([table_RJ] * 2), chunks.borders(list(firsts)),
        jnp.concatenate(lengths), kv_lengths_R=jnp.concatenate([_one_more(here_R)] * 2), stripe=stripe, anywhere=True,
    )  # fmt: skip


def _decoding(rank: Rank, chunks: Chunks, q_TNH: jax.Array, tokens: Pages, pages: Pages) -> Part:
    """Of the slots that decode, one row each, the first rows of all; the others see nothing."""
    slots, rows = len(rank.view.decode_lengths_B), 2 * chunks.block * chunks.ranks
    place_B = context.places(rows, chunks.ranks)[:slots]
    at_B, mine_B = place_B % (2 * chunks.block), jnp.asarray(place_B // (2 * chunks.block)) == rank.stripe.rank
    # Of every row all ranks but one add zeros.
    q_BNH = jax.lax.psum(jnp.where(mine_B[:, None, None], q_TNH[at_B], 0), CONTEXT)
    part = decoded(rank, q_BNH[:, None], tokens, pages)
    out_BNH = jnp.where(mine_B[:, None, None], part.out[:, 0], 0.0)
    lse_BN = jnp.where(mine_B[:, None], part.lse[:, 0], -jnp.inf)
    nothing = jnp.zeros_like(q_TNH, jnp.float32), jnp.full(q_TNH.shape[:2], -jnp.inf, jnp.float32)
    return Part(nothing[0].at[at_B].add(out_BNH), nothing[1].at[at_B].max(lse_BN))

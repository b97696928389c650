"""Of pages that are dealt out to ranks: attention of what decodes, of which every rank has all queries."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

from jaxinfer.cache.pages import Pages
from jaxinfer.cache.rank import Rank, over_ranks
from jaxinfer.cache.store import store
from pallas_kernels.flash_decoding import flash_decoding
from pallas_kernels.parts import Part, merged


def decode(rank: Rank, q_TNH: jax.Array, tokens: Pages, pages: Pages) -> tuple[Part, Pages]:
    queries = rank.view.queries
    pages = store(pages, rank.places(rank.view.write_T, pages), tokens)
    q_BQNH = q_TNH.reshape(-1, queries, *q_TNH.shape[1:])
    part = decoded(rank, q_BQNH, tokens, pages)
    return Part(part.out.reshape(q_TNH.shape), part.lse.reshape(q_TNH.shape[:2])), pages


def decoded(rank: Rank, q_BQNH: jax.Array, tokens: Pages, pages: Pages) -> Part:
    """Of each slot's last queries over the pages of all ranks."""
    view, stripe, queries = rank.view, rank.stripe, q_BQNH.shape[1]
    table_BJ, page_size = rank.table(view.decode_tables_BJ, pages), pages.k_PSKH.shape[1]
    if rank.window is not None:
        own = rank.attended(
            flash_decoding, q_BQNH, pages, table_BJ, view.decode_lengths_B, stripe=stripe, anywhere=True,
            tree_mask_BQW=view.tree_mask_BQW,
        )  # fmt: skip
        return over_ranks(own)
    if queries == 1:
        lengths_B = stripe.keys(view.decode_lengths_B, page_size)
        return over_ranks(rank.attended(flash_decoding, q_BQNH, pages, table_BJ, lengths_B))
    return merged(over_ranks(_before(rank, q_BQNH, pages, table_BJ)), _among_new(rank, q_BQNH, tokens))


def _before(rank: Rank, q_BQNH: jax.Array, pages: Pages, table_BJ: jax.Array) -> Part:
    """Over what came before a slot's new tokens, which all of its queries see: to a kernel they are one query of more
    heads."""
    Q, K = q_BQNH.shape[1], pages.k_PSKH.shape[2]
    before_B = jnp.maximum(rank.view.decode_lengths_B - Q, 0)
    lengths_B = rank.stripe.keys(before_B, pages.k_PSKH.shape[1])
    q_B1NH = rearrange(q_BQNH, "B Q (K g) H -> B 1 (K Q g) H", K=K)
    part = rank.attended(flash_decoding, q_B1NH, pages, table_BJ, lengths_B)
    out_BQNH = rearrange(part.out, "B 1 (K Q g) H -> B Q (K g) H", K=K, Q=Q)
    return Part(out_BQNH, rearrange(part.lse, "B 1 (K Q g) -> B Q (K g)", K=K, Q=Q))


def _among_new(rank: Rank, q_BQNH: jax.Array, tokens: Pages) -> Part:
    """Over a slot's new tokens, which here are a page."""
    B, Q = q_BQNH.shape[:2]
    one_page = partial(rearrange, pattern="(B Q) 1 K H -> B Q K H", Q=Q)
    scales = lambda x: None if x is None else rearrange(x, "(B Q) K 1 -> B K Q", Q=Q)  # noqa: E731
    k_PSKH, v_PSKH = one_page(tokens.k_PSKH), one_page(tokens.v_PSKH)
    new = Pages(k_PSKH, v_PSKH, scales(tokens.k_scales_PKS), scales(tokens.v_scales_PKS))
    table_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
    lengths_B = jnp.where(rank.view.decode_lengths_B > 0, Q, 0)
    return rank.attended(
        flash_decoding, q_BQNH, new, table_B1, lengths_B, tree_mask_BQW=rank.view.tree_mask_BQW, anywhere=True
    )

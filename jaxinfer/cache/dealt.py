"""Attention over pages that are dealt out to ranks: page j of a sequence lies on rank j mod c of the axis `context`.

A rank attends to its own pages, and the results of all are merged by log-sum-exp. Which keys a query sees goes by
their true positions. Kernels take the keys of a row as if one followed the other; that serves queries which see all
the keys that a rank has of their sequence, as those do that decode, and those of a chunk all that came before it. The
chunk's own keys go round in a ring, where each rank's queries meet them and each rank keeps those of its own pages.
A window's edge is different for each query: there XLA masks by position.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from einops import rearrange
from jax.sharding import PartitionSpec as P

from jaxinfer.cache.dealt_decode import decode
from jaxinfer.cache.dealt_prefill import prefill
from jaxinfer.cache.pages import Pages, View, specs_of_pages
from jaxinfer.cache.rank import Rank
from jaxinfer.cache.store import token_pages
from jaxinfer.parallel import TENSOR, attend, row_axis
from pallas_kernels.parts import with_sinks


def attend_dealt(
    q_TKgH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, pages: Pages, view: View, sinks_Kg: jax.Array | None,
    scores: dict[str, Any],
) -> tuple[jax.Array, Pages]:  # fmt: skip
    """`attend_pages` where the axis `context` has several ranks.

    The rows are spread over the ranks where the view has a ragged prefill, and else the same on each. Page tables and
    `write_T` name pages of the pool of all ranks, of which each has an equal part, with a null page of its own.

    Args:
        scores: `scale`, `window` and `soft_cap`.
    """
    rows, pool = P(row_axis(q_TKgH), TENSOR), specs_of_pages()
    specs = (rows, rows, rows, pool, P(), P(TENSOR))
    local = partial(_local, scores=scores)
    return attend(local, specs, (rows, pool), q_TKgH, k_TKH, v_TKH, pages, view, sinks_Kg)


def _local(q_TKgH, k_TKH, v_TKH, pages: Pages, view: View, sinks_Kg, *, scores: dict[str, Any]):
    q_TNH = rearrange(q_TKgH, "T K g H -> T (K g) H")
    tokens, rank = token_pages(pages, k_TKH, v_TKH), Rank(view, scores)
    sinks_N = None if sinks_Kg is None else sinks_Kg.reshape(-1)
    run = prefill if len(view.prefill_lengths_R) else decode
    part, pages = run(rank, q_TNH, tokens, pages)
    return with_sinks(part, sinks_N).out.astype(q_TKgH.dtype).reshape(q_TKgH.shape), pages

"""Attention over pages: write the step's keys and values, then read what was written."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int32, UInt32

from jaxinfer.cache.dealt import attend_dealt
from jaxinfer.cache.pages import Pages, View, specs_of_pages
from jaxinfer.cache.quantized import numbers
from jaxinfer.cache.store import scale_index, write
from jaxinfer.parallel import TENSOR, attend, context
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_decoding import flash_decoding, pack_tree_mask, plan


def attend_pages(
    q_TKgH: Float[Array, "T K g H"], k_TKH: Float[Array, "T K H"], v_TKH: Float[Array, "T K H"], pages: Pages,
    view: View, *, scale: float, window: int | None = None, soft_cap: float | None = None,
    sinks_Kg: Float[Array, "K g"] | None = None,
) -> tuple[Float[Array, "T K g H"], Pages]:  # fmt: skip
    """Attention of a step's tokens over their sequences, causal or along the paths of a tree, on every device's own
    heads.

    Flash decoding serves what decodes, flash attention the ragged prefill. Both read from the pages, also the
    tokens of this very step.

    Returns:
        the output, of the shape of `q_TKgH`, and the pages with the step's keys and values.
    """
    if context.ranks() > 1:
        options = {"scale": scale, "window": window, "soft_cap": soft_cap}
        return attend_dealt(q_TKgH, k_TKH, v_TKH, pages, view, sinks_Kg, options)
    heads, pool = P(None, TENSOR), specs_of_pages()
    local = partial(_local, scale=scale, window=window, soft_cap=soft_cap)
    specs = (heads, heads, heads, pool, P(), P(TENSOR))
    return attend(local, specs, (heads, pool), q_TKgH, k_TKH, v_TKH, pages, view, sinks_Kg)


def _local(q_TKgH, k_TKH, v_TKH, pages, view, sinks_Kg, **scores):
    pages = write(pages, view.write_T, k_TKH, v_TKH)
    sinks_N = None if sinks_Kg is None else sinks_Kg.reshape(-1)
    k_PSKH, v_PSKH = numbers(pages.k_PSKH), numbers(pages.v_PSKH)
    q_TNH = rearrange(q_TKgH, "T K g H -> T (K g) H")
    rectangle = view.decode_lengths_B.shape[0] * view.queries
    options = {
        "k_scales_PKS": pages.k_scales_PKS, "v_scales_PKS": pages.v_scales_PKS, "sinks_N": sinks_N,
        "implementation": view.implementation, **scores,
    }  # fmt: skip
    shape, out_TNH = q_TNH.shape, None
    if len(view.prefill_lengths_R):
        out_TNH = flash_attention(
            q_TNH, k_PSKH, v_PSKH, view.prefill_tables_RJ, view.prefill_starts_R1, view.prefill_lengths_R, **options
        )
    if rectangle:
        q_BQNH = q_TNH[:rectangle].reshape(-1, view.queries, *shape[1:])
        decoded_BQNH = flash_decoding(
            q_BQNH, k_PSKH, v_PSKH, view.decode_tables_BJ, view.decode_lengths_B,
            tree_mask_BQW=view.tree_mask_BQW, schedule=view.schedule, **options,
        )  # fmt: skip
        decoded_TNH = decoded_BQNH.reshape(rectangle, *shape[1:])
        # Of every row one of the two has seen nothing, and is zero.
        out_TNH = decoded_TNH if out_TNH is None else _added(out_TNH, decoded_TNH)
    assert out_TNH is not None
    return out_TNH.reshape(q_TKgH.shape), pages


def _added(out_TNH: jax.Array, first_BNH: jax.Array) -> jax.Array:
    """With something added to the first rows.

    Not by `at[:rows]`: where these are all rows its array of indices has no elements, and XLA's compiler crashes over
    a `shard_map` that has such an operand (JAX 0.11.2).
    """
    rows = first_BNH.shape[0]
    return jax.lax.dynamic_update_slice_in_dim(out_TNH, out_TNH[:rows] + first_BNH, 0, axis=0)


def scheduled(
    view: View, q_NH: jax.ShapeDtypeStruct, page_SKH: jax.ShapeDtypeStruct, window: int | None, implementation: str
) -> View:
    """The view with what the layers of its group have in common: the implementation, and the schedule of the decode
    kernel, where that runs, computed once.

    Args:
        q_NH: shape and dtype of a token's queries, on one device.
        page_SKH: of a page of keys, on one device.
        window: of the group's layers.
        implementation: as for `flash_decoding`.
    """
    view = replace(view, implementation=implementation)
    slots = view.decode_lengths_B.shape[0]
    if slots == 0 or context.ranks() > 1:  # each rank has a schedule of its own
        return view
    q_BQNH = jax.ShapeDtypeStruct((slots, view.queries, *q_NH.shape), q_NH.dtype)
    pages_PSKH = jax.ShapeDtypeStruct((1, *page_SKH.shape), page_SKH.dtype)
    schedule = plan(
        q_BQNH, pages_PSKH, view.decode_tables_BJ, view.decode_lengths_B, window=window, implementation=implementation
    )
    return replace(view, schedule=schedule)


def tree_mask(seen_BQQ: Bool[Array, "b Q Q"], slots: int) -> UInt32[Array, "B Q W"]:
    """Whether each of a slot's tokens in the rectangle sees each, as `View.tree_mask_BQW`; given once where it is the
    same for all slots."""
    return jnp.tile(pack_tree_mask(seen_BQQ), (slots // len(seen_BQQ), 1, 1))


def move(pages: Pages, from_T: Int32[Array, "T"], to_T: Int32[Array, "T"]) -> Pages:
    """Copies keys and values, as they are stored, from some slots to others, on every device's own heads. All are read
    before any is written.

    Args:
        from_T, to_T: page x page size + slot, as in `View.write_T`; those of the null page stand for no copy.
    """
    specs: Any = jax.tree.map(lambda pool: jax.typeof(pool).sharding.spec, pages)
    return attend(_moved, (specs, P(), P()), specs, pages, from_T, to_T)


def _moved(pages, from_T, to_T):
    def numbers_of(pool_PSKH):
        flat = pool_PSKH.reshape(-1, *pool_PSKH.shape[2:])
        return flat.at[to_T].set(flat[from_T], unique_indices=True).reshape(pool_PSKH.shape)

    def scales_of(scales_PKS):
        flat = scales_PKS.reshape(-1)
        to_TK, from_TK = (scale_index(at_T, scales_PKS) for at_T in (to_T, from_T))
        return flat.at[to_TK].set(flat[from_TK], unique_indices=True).reshape(scales_PKS.shape)

    k_PSKH, v_PSKH = numbers_of(pages.k_PSKH), numbers_of(pages.v_PSKH)
    if pages.k_scales_PKS is None or pages.v_scales_PKS is None:
        return Pages(k_PSKH, v_PSKH)
    return Pages(k_PSKH, v_PSKH, scales_of(pages.k_scales_PKS), scales_of(pages.v_scales_PKS))

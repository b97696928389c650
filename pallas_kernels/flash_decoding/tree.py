"""Masks of drafted tokens that form a tree, as bits: which of the new keys of its slot a query sees.

Tokens that are drafted as several continuations at once are verified in one step (SpecInfer, Miao et al. 2024,
section 4.2; Medusa, Cai et al. 2024, section 2.3). A query sees the tokens on its own path only, and its position is
its depth on that path. Here C counts the new keys, and W words of 32 bits hold one query's mask.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blockwise import Tree, ceil_div, visible_in_tree
from pallas_kernels.checks import require, require_array
from pallas_kernels.flash_decoding.config import TILE_KEYS
from pallas_kernels.flash_decoding.units import Shape, rows_of_queries

WORD = 32
MAX_QUERIES = 128
DTYPES = ("uint32", "int32")


def pack_tree_mask(seen_BQQ: jax.Array) -> jax.Array:
    """Whether each query sees each of the new keys, [B, Q, Q] of bool, as the words tree_mask_BQW that the op takes.

    Raises:
      ValueError: names what is wrong with the array, and what is allowed.
    """
    require_array("seen", seen_BQQ)
    square = seen_BQQ.ndim == 3 and seen_BQQ.shape[1] == seen_BQQ.shape[2]
    require(square, "seen.shape", seen_BQQ.shape, "the axes BQQ, a row and a column for each new key")
    require(seen_BQQ.dtype == bool, "seen.dtype", seen_BQQ.dtype, "bool")
    return _pack(seen_BQQ)


def _pack(seen_BQC: jax.Array) -> jax.Array:
    """The words of any number of keys."""
    padding = -seen_BQC.shape[-1] % WORD
    seen_BQC = jnp.pad(seen_BQC, ((0, 0), (0, 0), (0, padding)))
    bits_BQWb = seen_BQC.reshape(*seen_BQC.shape[:2], -1, WORD).astype(jnp.uint32)
    return jnp.sum(bits_BQWb << _places(), axis=-1, dtype=jnp.uint32)


def unpack_tree_mask(tree_mask_BQW: jax.Array) -> jax.Array:
    """The inverse of `pack_tree_mask`; bits past the last query are dropped."""
    B, Q, _ = tree_mask_BQW.shape
    words_BQW1 = lax.bitcast_convert_type(tree_mask_BQW, jnp.uint32)[..., None]
    bits_BQWb = (words_BQW1 >> _places()) & jnp.uint32(1)
    return bits_BQWb.reshape(B, Q, -1)[:, :, :Q] != 0


def _places() -> jax.Array:
    return lax.broadcasted_iota(jnp.uint32, (1, 1, 1, WORD), 3)


def check_tree_mask(tree_mask_BQW: jax.Array, slots: int, queries: int) -> None:
    """
    Raises:
      ValueError: names what is wrong with the mask, and what is allowed.
    """
    require_array("tree_mask", tree_mask_BQW)
    require(tree_mask_BQW.dtype.name in DTYPES, "tree_mask.dtype", tree_mask_BQW.dtype, ", ".join(DTYPES))
    shape = (slots, queries, ceil_div(queries, WORD))
    require(
        tree_mask_BQW.shape == shape,
        "tree_mask.shape",
        tree_mask_BQW.shape,
        f"{shape}, the words of every query's bits",
    )
    require(queries <= MAX_QUERIES, "tree_mask.shape", tree_mask_BQW.shape, f"at most {MAX_QUERIES} queries")


def make_tree(tree_mask_BQW: jax.Array, window: int | None) -> Tree:
    """What the mask means: a query's depth is the number of new keys before its own on its path.

    Keys that lie on the path but outside the window are left out.
    """
    seen_BQC = unpack_tree_mask(tree_mask_BQW)
    depth_BQ = jnp.maximum(jnp.sum(seen_BQC, axis=2, dtype=jnp.int32) - 1, 0)
    if window is not None:
        seen_BQC &= depth_BQ[:, None, :] > depth_BQ[:, :, None] - window
    return Tree(seen_BQC, depth_BQ)


class TreeRows(NamedTuple):
    """A tree as the kernel reads it.

    Bits are of the keys of whole tiles, from the first one on that holds a new key: two words for each tile.

    Attributes:
        words: [slots x blocks, words, ROWS], the keys that each row sees.
        any: [slots, words], the keys that any query of the slot sees.
        depth: [slots x blocks, ROWS], of each row's query; None without a window, which alone needs it.
    """

    words: jax.Array
    any: jax.Array
    depth: jax.Array | None


def tree_rows(tree_mask_BQW: jax.Array, lengths_B: jax.Array, shape: Shape, window: int | None) -> TreeRows:
    tree = make_tree(tree_mask_BQW, window)
    first_B = lengths_B - shape.queries
    # Q keys in a row touch at most so many tiles.
    keys = TILE_KEYS * ((shape.queries + TILE_KEYS - 2) // TILE_KEYS + 1)
    key_BC = (first_new_tile(lengths_B, shape.queries) * TILE_KEYS)[:, None] + jnp.arange(keys, dtype=jnp.int32)[None]
    seen_BQC = visible_in_tree(key_BC - first_B[:, None], window, tree)
    words_BQW = lax.bitcast_convert_type(_pack(seen_BQC), jnp.int32)
    any_B1W = lax.bitcast_convert_type(_pack(seen_BQC.any(1, keepdims=True)), jnp.int32)
    words_bRW = rows_of_queries(words_BQW, shape)
    depth_bR = None if window is None else rows_of_queries(tree.depth_BQ[..., None], shape)[..., 0]
    return TreeRows(words_bRW.transpose(0, 2, 1), any_B1W[:, 0], depth_bR)


def first_new_tile(length, queries: int):
    """The first tile that holds a new key, counted from the slot's first key."""
    return jnp.maximum(length - queries, 0) // TILE_KEYS

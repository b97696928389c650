"""Attention of tiles of queries over their paged keys, one block of pages after the other.

Both XLA paths are this computation: a decode slot is a tile of Q queries, and ragged prefill is cut into
such tiles. The softmax is accumulated online over the blocks (Milakov and Gimelshein 2018, "Online
normalizer calculation for softmax", section 3; FlashAttention, Dao et al. 2022, algorithm 1), so that no
array grows with queries times keys.

Masked scores and values are selected away, never multiplied by zero: unused slots may hold NaN.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.stripe import Stripe

Attend = Callable[..., tuple[jax.Array, jax.Array]]  # `attend` below, or what stands for it
# Stands for minus infinity where differences are taken: -inf minus -inf would be NaN.
LOWEST = -1e30
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Options:
    """What the scores go through, known when the program is traced."""

    scale: float
    window: int | None = None
    soft_cap: float | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedKV:
    """The pool of pages; the scales (float32, one per slot and head) exist when the pages are quantized.

    A page's scales lie head by head, so that those of one head are read without those of the others.
    """

    k_PSKH: jax.Array
    v_PSKH: jax.Array
    k_scales_PKS: jax.Array | None = None
    v_scales_PKS: jax.Array | None = None

    @property
    def page_size(self) -> int:
        return self.k_PSKH.shape[1]

    def load(self, pages_BJ: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Gathers K and V of the given pages, dequantized, as k_BKCH and v_BKCH with C = J * S."""
        return (
            _gather(self.k_PSKH, self.k_scales_PKS, pages_BJ, dtype),
            _gather(self.v_PSKH, self.v_scales_PKS, pages_BJ, dtype),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tree:
    """Which of the last Q keys of a row its Q queries see, where that is not the causal triangle.

    Attributes:
        seen_BQC: whether query q sees new key c.
        depth_BQ: position of each query, and of its key, counted from the first new position.
    """

    seen_BQC: jax.Array
    depth_BQ: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Softmax:
    """A softmax under way, in float32, over the keys seen so far: unnormalized values, maximum and sum."""

    values_BKgQH: jax.Array
    max_BKgQ: jax.Array
    sum_BKgQ: jax.Array


def attend(
    q_BQNH: jax.Array,
    position_BQ: jax.Array,
    kv: PagedKV,
    table_BJ: jax.Array,
    sinks_N: jax.Array | None,
    options: Options,
    *,
    block_keys: int,
    tree: Tree | None = None,
    end_B: jax.Array | None = None,
    stripe: Stripe | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends each row of queries to the keys that its row of the page table holds.

    Positions rise along a row; a query at a negative position sees nothing. With a tree they count the keys, and
    the tree says which of those at the row's own positions each query sees. Keys at position `end` or past it are not
    there. At most about B * block_keys keys are gathered at a time. Returns out_BQNH in q's dtype and lse_BQN in
    float32.
    """
    B, Q, N, H = q_BQNH.shape
    K, S = kv.k_PSKH.shape[2], kv.page_size
    q_BQKgH = q_BQNH.reshape(B, Q, K, N // K, H)
    pages_BJ, start_B = _pages_in_sight(table_BJ, position_BQ, S, options.window, stripe)

    def add_block(softmax: Softmax, block_BJ: jax.Array, first_key_B: jax.Array) -> Softmax:
        k_BKCH, v_BKCH = kv.load(block_BJ, q_BQNH.dtype)
        key_BC = first_key_B[:, None] + jnp.arange(k_BKCH.shape[2], dtype=jnp.int32)[None]
        key_BC = key_BC if stripe is None else stripe.position(key_BC, S)
        visible_BQC = _visible(position_BQ, key_BC, options.window, tree)
        if end_B is not None:
            visible_BQC &= (key_BC < end_B[:, None])[:, None]
        return _update(softmax, q_BQKgH, k_BKCH, v_BKCH, visible_BQC, options)

    softmax = _nothing_seen(q_BQKgH)
    columns = max(1, block_keys // S)
    if pages_BJ.shape[1] <= columns:
        return _finish(add_block(softmax, pages_BJ, start_B), sinks_N, q_BQNH.dtype)

    # A dynamic slice clamps at the end instead of reading past it, so the last block needs its full width.
    pages_BJ = jnp.pad(pages_BJ, ((0, 0), (0, -pages_BJ.shape[1] % columns)))
    seen_B = jnp.max(position_BQ, axis=1) + 1
    seen_B = seen_B if end_B is None else jnp.minimum(seen_B, end_B)
    seen_B = seen_B if stripe is None else stripe.keys(jnp.maximum(seen_B, 0), S)
    keys_in_sight = jnp.max(seen_B - start_B)

    def add_nth_block(i: jax.Array, softmax: Softmax) -> Softmax:
        block_BJ = jax.lax.dynamic_slice_in_dim(pages_BJ, i * columns, columns, axis=1)
        return add_block(softmax, block_BJ, start_B + i * columns * S)

    softmax = jax.lax.fori_loop(0, ceil_div(keys_in_sight, columns * S), add_nth_block, softmax)
    return _finish(softmax, sinks_N, q_BQNH.dtype)


def ceil_div[Integer: (int, jax.Array)](a: Integer, b: int) -> Integer:
    return -(-a // b)


def _pages_in_sight(
    table_BJ: jax.Array, position_BQ: jax.Array, page_size: int, window: int | None, stripe: Stripe | None
) -> tuple[jax.Array, jax.Array]:
    """The columns of the page table that a row's queries can see, and the first of their keys.

    The Q queries of a row see window + Q - 1 keys at most, which bounds the number of columns before any
    length is known: a layer with a short window reads few pages of a long sequence.
    """
    (B, J), Q, ranks = table_BJ.shape, position_BQ.shape[1], 1 if stripe is None else stripe.ranks
    if window is None or (in_sight := ceil_div(ceil_div(window + Q - 2, page_size) + 1, ranks)) >= J:
        return table_BJ, jnp.zeros((B,), jnp.int32)
    first_column_B = jnp.maximum(position_BQ[:, 0] - window + 1, 0) // page_size
    first_column_B = first_column_B if stripe is None else stripe.columns(first_column_B)
    # Columns past the end of the table hold no visible key, whichever page stands in for them.
    column_BJ = jnp.minimum(first_column_B[:, None] + jnp.arange(in_sight, dtype=jnp.int32)[None], J - 1)
    return jnp.take_along_axis(table_BJ, column_BJ, axis=1), first_column_B * page_size


def _gather(pages_PSKH: jax.Array, scales_PKS: jax.Array | None, pages_BJ: jax.Array, dtype: jnp.dtype) -> jax.Array:
    # The order of the batched products, [B, K] outermost, in the same pass that gathers: no transposed
    # second copy.
    x_BJSKH = jnp.take(as_moved(pages_PSKH), pages_BJ, axis=0, mode="clip")
    x_BKJSH = jax.lax.bitcast_convert_type(x_BJSKH, pages_PSKH.dtype).transpose(0, 3, 1, 2, 4)
    if scales_PKS is not None:
        scales_BKJS = jnp.take(scales_PKS, pages_BJ, axis=0, mode="clip").transpose(0, 2, 1, 3)
        x_BKJSH = x_BKJSH.astype(jnp.float32) * scales_BKJS[..., None]
    B, K, J, S, H = x_BKJSH.shape
    return x_BKJSH.astype(dtype).reshape(B, K, J * S, H)


def as_moved(x: jax.Array) -> jax.Array:
    """8-bit floats as bytes: gathered or scattered as floats, XLA may convert the whole array to wider ones first."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 1
    return jax.lax.bitcast_convert_type(x, jnp.uint8) if narrow else x


def visible_in_tree(nth_BC: jax.Array, window: int | None, tree: Tree) -> jax.Array:
    """Whether each query sees keys that are counted from the first new one; those before it are negative."""
    nth_B1C, Q = nth_BC[:, None], tree.seen_BQC.shape[2]
    seen_BQC = jnp.take_along_axis(tree.seen_BQC, jnp.clip(nth_B1C, 0, Q - 1), axis=2) & (nth_B1C < Q)
    if window is None:
        return seen_BQC | (nth_B1C < 0)
    return jnp.where(nth_B1C < 0, nth_B1C > tree.depth_BQ[:, :, None] - window, seen_BQC)


def _visible(position_BQ: jax.Array, key_BC: jax.Array, window: int | None, tree: Tree | None) -> jax.Array:
    if tree is not None:
        return visible_in_tree(key_BC - position_BQ[:, :1], window, tree)
    visible_BQC = key_BC[:, None, :] <= position_BQ[:, :, None]
    if window is not None:
        visible_BQC &= key_BC[:, None, :] > position_BQ[:, :, None] - window
    return visible_BQC


def _nothing_seen(q_BQKgH: jax.Array) -> Softmax:
    B, Q, K, g, H = q_BQKgH.shape
    # zeros_like keeps the mesh axes that q varies over, which a loop's carry has to name from the start.
    zeros_BKgQ = jnp.zeros_like(q_BQKgH, jnp.float32, shape=(B, K, g, Q))
    values_BKgQH = jnp.zeros_like(q_BQKgH, jnp.float32, shape=(B, K, g, Q, H))
    return Softmax(values_BKgQH, zeros_BKgQ + LOWEST, zeros_BKgQ)


def _update(
    softmax: Softmax,
    q_BQKgH: jax.Array,
    k_BKCH: jax.Array,
    v_BKCH: jax.Array,
    visible_BQC: jax.Array,
    options: Options,
) -> Softmax:
    # K and V are shared by the queries of a group, not repeated.
    scores_BKgQC = jnp.einsum("BQKgH,BKCH->BKgQC", q_BQKgH, k_BKCH, preferred_element_type=jnp.float32)
    scores_BKgQC = scores_BKgQC * options.scale
    if options.soft_cap is not None:
        scores_BKgQC = options.soft_cap * jnp.tanh(scores_BKgQC / options.soft_cap)
    mask_B11QC = visible_BQC[:, None, None]
    scores_BKgQC = jnp.where(mask_B11QC, scores_BKgQC, LOWEST)
    max_BKgQ = jnp.maximum(softmax.max_BKgQ, scores_BKgQC.max(-1))
    # A row that has seen nothing has maximum LOWEST, and exp(LOWEST - LOWEST) is 1: hence the second
    # selection.
    weights_BKgQC = jnp.where(mask_B11QC, jnp.exp(scores_BKgQC - max_BKgQ[..., None]), 0.0)
    # A key that no query of the row sees may be NaN, and zero times NaN is NaN.
    v_BKCH = jnp.where(visible_BQC.any(1)[:, None, :, None], v_BKCH, 0.0)
    decay_BKgQ = jnp.exp(softmax.max_BKgQ - max_BKgQ)
    values_BKgQH = jnp.einsum(
        "BKgQC,BKCH->BKgQH", weights_BKgQC.astype(v_BKCH.dtype), v_BKCH, preferred_element_type=jnp.float32
    )
    return Softmax(
        softmax.values_BKgQH * decay_BKgQ[..., None] + values_BKgQH,
        max_BKgQ,
        softmax.sum_BKgQ * decay_BKgQ + weights_BKgQC.sum(-1),
    )


def _finish(softmax: Softmax, sinks_N: jax.Array | None, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Normalizes; the sink of a head joins the sum, without a value (gpt-oss)."""
    B, K, g, Q, H = softmax.values_BKgQH.shape
    max_BKgQ, sum_BKgQ, values_BKgQH = softmax.max_BKgQ, softmax.sum_BKgQ, softmax.values_BKgQH
    seen_BKgQ = sum_BKgQ > 0
    if sinks_N is not None:
        sinks_1Kg1 = sinks_N.astype(jnp.float32).reshape(1, K, g, 1)
        with_sink_BKgQ = jnp.maximum(max_BKgQ, sinks_1Kg1)
        decay_BKgQ = jnp.exp(max_BKgQ - with_sink_BKgQ)
        sum_BKgQ = sum_BKgQ * decay_BKgQ + jnp.exp(sinks_1Kg1 - with_sink_BKgQ)
        values_BKgQH, max_BKgQ = values_BKgQH * decay_BKgQ[..., None], with_sink_BKgQ
    out_BKgQH = jnp.where(seen_BKgQ[..., None], values_BKgQH / sum_BKgQ[..., None], 0.0)
    lse_BKgQ = jnp.where(seen_BKgQ, max_BKgQ + jnp.log(sum_BKgQ), -jnp.inf)
    out_BQNH = out_BKgQH.astype(dtype).transpose(0, 3, 1, 2, 4).reshape(B, Q, K * g, H)
    return out_BQNH, lse_BKgQ.transpose(0, 3, 1, 2).reshape(B, Q, K * g)


def log2_size(scales: jax.Array) -> jax.Array:
    """Of the scales of values, for a softmax whose weights are multiplied by them and then rounded to float16: it is
    taken relative to the largest product, so that none exceeds 1 and those that count are not subnormal.

    Bounded, so that a weight relative to a product with a scale of 0 is a finite number.
    """
    return jnp.log(jnp.maximum(jnp.abs(scales), 2.0**-64)) * LOG2E


def share(part_lse: jax.Array, whole_lse: jax.Array) -> jax.Array:
    """What attention over a part of the keys is of that over all, by their log-sum-exps; 0 where nothing is seen."""
    return jnp.where(part_lse > -jnp.inf, jnp.exp(part_lse - whole_lse), 0.0)

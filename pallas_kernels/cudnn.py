"""Attention of tiles of queries over their paged keys by cuDNN: what `blockwise.attend` is in plain XLA.

cuDNN, as JAX calls it, aligns a causal mask with the first key, not the last, and knows no sinks. Queries at the
positions p, p + 1, ... therefore see their keys in two parts, which cuDNN takes, and which merge by log-sum-exp: the
keys from p on, with the causal mask, and those before p, with a length. Under a window one part does: keys and rows
both begin a window before p, and the rows before p are thrown away.

The keys are gathered from the pages first, block by block, dequantized if need be, and with zeros for what no query
sees. JAX's paged form of cuDNN would spare that copy, but it wants a pool of just the pages of the table, and reads
what no query sees, which may be NaN.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused  # jax.nn gives the log-sum-exp in 16 bits only

from pallas_kernels import dispatch
from pallas_kernels.blockwise import Options, PagedKV, as_moved, ceil_div
from pallas_kernels.parts import Part, merged, with_sinks

DTYPES = ("bfloat16", "float16")


def unsupported(q: jax.Array, options: Options) -> dispatch.Refusal | str | None:
    """Why cuDNN cannot take an input that the public ops allow; None if it can."""
    head_size = q.shape[-1]
    largest = 256 if (dispatch.compute_capability() or dispatch.AMPERE) >= dispatch.HOPPER else 128
    if fused.cuda_versions is None:  # pyright: ignore[reportPrivateImportUsage]
        return "JAX finds no cuDNN here"
    if q.dtype.name not in DTYPES:
        return dispatch.Refusal("q.dtype", q.dtype, ", ".join(DTYPES))
    if head_size % 8 or head_size > largest:
        return dispatch.Refusal("q.shape", q.shape, f"head sizes that are multiples of 8 up to {largest}")
    if options.soft_cap is not None:
        return dispatch.Refusal("soft_cap", options.soft_cap, "None")
    if options.scale <= 0:
        return dispatch.Refusal("scale", options.scale, "above 0")
    return None


class PagedTable(NamedTuple):
    """The keys of B sequences, through their rows of the page table."""

    kv: PagedKV
    table_BJ: jax.Array

    @property
    def most(self) -> int:
        """Keys that a row of the table holds."""
        return self.table_BJ.shape[1] * self.kv.page_size

    def load(self, begin_B: jax.Array, end_B: jax.Array, number: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """k_BCKH and v_BCKH of `number` keys from `begin` on, zeros from `end` on."""
        key_BC = begin_B[:, None] + jnp.arange(number, dtype=jnp.int32)[None]
        page_BC = jnp.take_along_axis(self.table_BJ, jnp.minimum(key_BC, self.most - 1) // self.kv.page_size, axis=1)
        place_BC, seen_BC = key_BC % self.kv.page_size, key_BC < end_B[:, None]
        slot_BC = page_BC * self.kv.page_size + place_BC

        def gather(pages_PSKH: jax.Array, scales_PKS: jax.Array | None) -> jax.Array:
            P, S, K, H = pages_PSKH.shape
            x_BCKH = jnp.take(as_moved(pages_PSKH).reshape(P * S, K, H), slot_BC, axis=0, mode="clip")
            x_BCKH = jax.lax.bitcast_convert_type(x_BCKH, pages_PSKH.dtype)
            if scales_PKS is not None:
                row_BCK = (page_BC * K)[..., None] + jnp.arange(K, dtype=jnp.int32)[None, None]
                # Flat: by page and slot XLA would bring these axes to the front first, of the whole pool.
                scales_BCK = jnp.take(scales_PKS, row_BCK * S + place_BC[..., None], mode="clip")
                x_BCKH = x_BCKH.astype(jnp.float32) * scales_BCK[..., None]
            return jnp.where(seen_BC[..., None, None], x_BCKH, 0).astype(dtype)

        return gather(self.kv.k_PSKH, self.kv.k_scales_PKS), gather(self.kv.v_PSKH, self.kv.v_scales_PKS)


class Rows(NamedTuple):
    """Queries for cuDNN: of each row of the batch, the first `number_B`."""

    q_BQNH: jax.Array
    number_B: jax.Array


def attend(
    q_BQNH: jax.Array,
    position_BQ: jax.Array,
    kv: PagedKV,
    table_BJ: jax.Array,
    sinks_N: jax.Array | None,
    options: Options,
    *,
    block_keys: int,
    tree: None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `blockwise.attend`, of rows whose positions are consecutive where they are not negative."""
    seen_BQ = position_BQ >= 0
    run = _one_query if q_BQNH.shape[1] == 1 else _tile
    part = run(q_BQNH, position_BQ, seen_BQ, PagedTable(kv, table_BJ), options, block_keys)
    return _finish(part, seen_BQ, sinks_N, q_BQNH.dtype)


def _one_query(q_B1NH, position_B1, seen_B1, keys: PagedTable, options: Options, block_keys: int) -> Part:
    """It sees the keys in its window, all of them."""
    end_B = jnp.maximum(position_B1[:, 0] + 1, 0)
    begin_B = jnp.zeros_like(end_B) if options.window is None else jnp.maximum(end_B - options.window, 0)
    most = min(keys.most, options.window or keys.most)
    rows = Rows(q_B1NH, seen_B1[:, 0].astype(jnp.int32))
    if most > block_keys:
        return _all_seen(rows, keys, begin_B, end_B, options, block_keys)
    return _cudnn(rows, keys.load(begin_B, end_B, most, q_B1NH.dtype), end_B - begin_B, options, causal=False)


def _tile(q_BQNH, position_BQ, seen_BQ, keys: PagedTable, options: Options, block_keys: int) -> Part:
    Q, window = q_BQNH.shape[1], options.window
    number_B = jnp.sum(seen_BQ, axis=1, dtype=jnp.int32)
    skipped_B = jnp.argmax(seen_BQ, axis=1).astype(jnp.int32)
    first_B = jnp.maximum(jnp.take_along_axis(position_BQ, skipped_B[:, None], axis=1)[:, 0], 0)
    # Under a window, rows of nothing come first, one for each key in sight before the first query's own.
    lead_B = jnp.zeros_like(first_B) if window is None else jnp.minimum(first_B, window - 1)
    length = Q if window is None else Q + min(window - 1, keys.most)
    rows = Rows(_moved(q_BQNH, lead_B - skipped_B, length), jnp.where(number_B > 0, lead_B + number_B, 0))
    begin_B = first_B - lead_B
    kv_BCKH = keys.load(begin_B, begin_B + rows.number_B, length, q_BQNH.dtype)
    part = _cudnn(rows, kv_BCKH, rows.number_B, options, causal=True)
    if window is None:
        end_B = jnp.where(number_B > 0, first_B, 0)
        before = _all_seen(rows, keys, jnp.zeros_like(end_B), end_B, options, min(block_keys, keys.most))
        part = merged(part, before)
    return Part(*(_moved(x, skipped_B - lead_B, Q) for x in part))


def _all_seen(rows: Rows, keys: PagedTable, begin_B, end_B, options: Options, block_keys: int) -> Part:
    """Over the keys [begin, end), each of which every query sees."""

    def add_block(i: jax.Array, part: Part) -> Part:
        start_B = begin_B + i * block_keys
        kv_BCKH = keys.load(start_B, end_B, block_keys, rows.q_BQNH.dtype)
        number_B = jnp.clip(end_B - start_B, 0, block_keys)
        return merged(part, _cudnn(rows, kv_BCKH, number_B, options, causal=False))

    q_BQNH = rows.q_BQNH
    nothing = Part(jnp.zeros_like(q_BQNH, jnp.float32), jnp.full_like(q_BQNH[..., 0], -jnp.inf, jnp.float32))
    return jax.lax.fori_loop(0, ceil_div(jnp.max(end_B - begin_B), block_keys), add_block, nothing)


def _cudnn(
    rows: Rows, kv_BCKH: tuple[jax.Array, jax.Array], keys_B: jax.Array, options: Options, *, causal: bool
) -> Part:
    """Over the first `keys_B` of the keys; with `causal`, row i sees those up to i, in its window."""
    results: Any = fused.dot_product_attention(
        rows.q_BQNH, *kv_BCKH,
        # A sequence of nothing is given one row and key, and its result is dropped.
        q_seqlen=jnp.maximum(rows.number_B, 1),
        kv_seqlen=jnp.maximum(keys_B, 1),
        scale=options.scale,
        mask_type=fused.MaskType.PADDING_CAUSAL if causal else fused.MaskType.PADDING,
        sliding_window_length=options.window if causal else None,
        return_residual=True,
    )  # fmt: skip
    out_BQNH, lse_BNQ = results
    row_1Q = jnp.arange(out_BQNH.shape[1], dtype=jnp.int32)[None]
    seen_BQ1 = ((row_1Q < rows.number_B[:, None]) & (keys_B > 0)[:, None])[..., None]
    out_BQNH = jnp.where(seen_BQ1[..., None], out_BQNH.astype(jnp.float32), 0.0)
    return Part(out_BQNH, jnp.where(seen_BQ1, lse_BNQ.transpose(0, 2, 1), -jnp.inf))


def _finish(
    part: Part, seen_BQ: jax.Array, sinks_N: jax.Array | None, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """What sees nothing, and the sinks: more to divide by (gpt-oss)."""
    out_BQNH, lse_BQN = with_sinks(part, sinks_N)
    seen_BQ1 = seen_BQ[..., None]
    return jnp.where(seen_BQ1[..., None], out_BQNH, 0.0).astype(dtype), jnp.where(seen_BQ1, lse_BQN, -jnp.inf)


def _moved(x_BQ: jax.Array, by_B: jax.Array, length: int) -> jax.Array:
    """`length` rows: row i of x is row i + by. What comes from outside of x is never read."""
    row_BE = jnp.arange(length, dtype=jnp.int32)[None] - by_B[:, None]
    row_BE = jnp.clip(row_BE, 0, x_BQ.shape[1] - 1)
    return jnp.take_along_axis(x_BQ, row_BE.reshape(row_BE.shape + (1,) * (x_BQ.ndim - 2)), axis=1)

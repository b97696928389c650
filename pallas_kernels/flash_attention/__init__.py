"""Attention of ragged prefill queries over a paged cache: causal, grouped heads, window, soft cap, sinks."""

from functools import partial
from typing import Any

import jax

from pallas_kernels import checks, dispatch
from pallas_kernels.blockwise import Options, PagedKV
from pallas_kernels.flash_attention import cudnn, mosaic_gpu, reference, xla
from pallas_kernels.flash_attention.config import unsupported
from pallas_kernels.stripe import Stripe

IMPLEMENTATIONS = {
    "mosaic_gpu": mosaic_gpu.flash_attention,
    "cudnn": cudnn.flash_attention,
    "xla": xla.flash_attention,
    "reference": reference.flash_attention,
}


def flash_attention(
    q_TNH: jax.Array,
    k_pages_PSKH: jax.Array,
    v_pages_PSKH: jax.Array,
    page_table_RJ: jax.Array,
    cu_q_R1: jax.Array,
    lengths_R: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    k_scales_PKS: jax.Array | None = None,
    v_scales_PKS: jax.Array | None = None,
    kv_lengths_R: jax.Array | None = None,
    stripe: Stripe | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Any:  # depends on return_lse
    """Attends ragged queries to the paged keys of their sequences.

    Sequence r owns the rows cu_q[r] to cu_q[r + 1] of q, n of them, and they are the last n positions of its
    lengths[r] keys, which are in the pages already: query i has position p = lengths[r] - n + i. Key p of
    sequence r is slot p % S of page page_table[r, p // S]. A query at p sees the keys up to p, of them the
    last `window` if given.

    Args:
      q_TNH: float32, bfloat16 or float16. Rows at or past cu_q[R] are padding: their output is 0, whatever
        they hold.
      k_pages_PSKH: the pool, of a floating dtype, or int8 or fp8 with scales. N is a multiple of K; query
        head n reads KV head n // (N / K). What no query sees may be NaN.
      v_pages_PSKH: as k_pages.
      page_table_RJ: int32, pages within the pool; what unused columns name is never seen.
      cu_q_R1: int32, R + 1 borders that start at 0 and never fall. A sequence may have no queries.
      lengths_R: int32, keys per sequence, those of its queries included. A query before position 0 gets
        output 0.
      scale: factor of the scores, usually H ** -0.5.
      soft_cap: c in c * tanh(scores / c), applied to the scaled scores (Gemma 2).
      sinks_N: a logit per query head that joins the softmax's denominator only (gpt-oss).
      k_scales_PKS: float32; a quantized key is value * scale. Those of a page lie head by head.
      v_scales_PKS: float32, likewise.
      kv_lengths_R: int32, keys that are there, where those of `lengths` are not all: none at position kv_lengths[r] or
        past it is seen, and the page table need not name their pages. None stands for `lengths`. XLA only.
      stripe: the pages of a sequence are dealt out to several ranks, and the page table names those of one, where
        lengths and positions count the tokens of all. `parts.merged` joins the results. XLA only.
      return_lse: also return the logarithm of the softmax's denominator; -inf where a query sees nothing.
      implementation: "mosaic_gpu" (Hopper), "cudnn" (from compute capability 8.0 on; bfloat16 and float16, head sizes
        that are multiples of 8 up to 128, on Hopper 256, no soft cap), "xla", "reference", or "auto": the first of
        these that takes the input here, save that few queries go to XLA instead of cuDNN.

    Returns:
      out_TNH in q's dtype and, if asked for, lse_TN in float32.

    Raises:
      ValueError: names the argument, what it is and what is allowed; before any device work. An implementation
        asked for by name says what it cannot take.

    The softmax is computed in float32 and the products in q's dtype with float32 sums. Memory beyond the
    result is independent of the pool and of the lengths (mosaic_gpu: of few queries before a long context, float32
    results of up to 16 parts of the keys; xla; cudnn: a copy of one block of keys and values, and of one tile of
    queries). Source: FlashAttention-2 (Dao 2023); pages as in PagedAttention (Kwon et al. 2023).
    """
    kv = PagedKV(k_pages_PSKH, v_pages_PSKH, k_scales_PKS, v_scales_PKS)
    options = Options(scale, window, soft_cap)
    checks.check_queries(q_TNH, "TNH")
    checks.check_options(options)
    in_pages_R = lengths_R if kv_lengths_R is None else kv_lengths_R
    checks.check_attention(q_TNH, kv, page_table_RJ, in_pages_R, sinks_N, stripe)
    checks.check_ragged(cu_q_R1, lengths_R, len(q_TNH))
    parts = _in_parts(kv_lengths_R, stripe)
    refusals = {
        dispatch.KERNEL: parts or unsupported(q_TNH, kv, options),
        dispatch.CUDNN: parts or cudnn.unsupported(q_TNH, options),
    }
    if implementation == "auto":
        refusals[dispatch.CUDNN] = refusals[dispatch.CUDNN] or cudnn.slower(q_TNH)
    run = dispatch.choose("flash_attention", implementation, IMPLEMENTATIONS, refusals)
    dispatch.require_here("flash_attention", implementation, q_TNH, kv, page_table_RJ, cu_q_R1, lengths_R, sinks_N)
    if parts is not None:
        run = partial(run, kv_lengths_R=kv_lengths_R, stripe=stripe)
    out_TNH, lse_TN = run(q_TNH, kv, page_table_RJ, cu_q_R1, lengths_R, sinks_N, options)
    return (out_TNH, lse_TN) if return_lse else out_TNH


def _in_parts(kv_lengths_R: jax.Array | None, stripe: Stripe | None) -> dispatch.Refusal | None:
    """Why only XLA takes keys that are not all there."""
    if stripe is not None:
        return dispatch.Refusal("stripe", f"one of {stripe.ranks}", "None")
    return None if kv_lengths_R is None else dispatch.Refusal("kv_lengths", "an array", "None")

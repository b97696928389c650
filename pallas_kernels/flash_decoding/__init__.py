"""Attention of a few queries per sequence over a paged cache: bound by the bytes of K and V."""

from typing import Any

import jax

from pallas_kernels import checks, dispatch
from pallas_kernels.blockwise import Options, PagedKV
from pallas_kernels.flash_decoding import cudnn, mosaic_gpu, reference, xla

IMPLEMENTATIONS = {
    "mosaic_gpu": mosaic_gpu.flash_decoding,
    "cudnn": cudnn.flash_decoding,
    "xla": xla.flash_decoding,
    "reference": reference.flash_decoding,
}


def flash_decoding(
    q_BQNH: jax.Array,
    k_pages_PSKH: jax.Array,
    v_pages_PSKH: jax.Array,
    page_table_BJ: jax.Array,
    lengths_B: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    k_scales_PSK: jax.Array | None = None,
    v_scales_PSK: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Any:  # depends on return_lse
    """Attends the last Q queries of every slot to the slot's paged keys.

    The queries of slot b are the last Q positions of its lengths[b] keys, which are in the pages already:
    query i has position p = lengths[b] - Q + i. Q is 1, or more when drafted tokens are verified.

    Args:
      q_BQNH: float32, bfloat16 or float16.
      page_table_BJ: int32, pages within the pool; what unused columns name is never seen.
      lengths_B: int32, keys per slot; 0 marks an empty slot. A query before position 0 gets output 0.
      implementation: as there; "cudnn" takes a window only with one query, and "auto" leaves one slot to XLA.
      The others: as for `pallas_kernels.flash_attention.flash_attention`.

    Returns:
      out_BQNH in q's dtype and, if asked for, lse_BQN in float32 (-inf where a query sees nothing).

    Raises:
      ValueError: names the argument, what it is and what is allowed; before any device work. An implementation
        asked for by name says what it cannot take.

    The kernel ("mosaic_gpu", Hopper) reads every page once, spread evenly over the multiprocessors whatever the
    lengths. Memory beyond the result is independent of the pool (xla and cudnn: a copy of the keys and values in
    sight, of 8192 keys per slot at most). Source: FlashDecoding (Dao et al. 2023); pages as in PagedAttention (Kwon
    et al. 2023).
    """
    kv = PagedKV(k_pages_PSKH, v_pages_PSKH, k_scales_PSK, v_scales_PSK)
    options = Options(scale, window, soft_cap)
    checks.check_queries(q_BQNH, "BQNH")
    checks.check_options(options)
    checks.check_attention(q_BQNH, kv, page_table_BJ, lengths_B, sinks_N)
    checks.require(
        len(q_BQNH) == len(lengths_B),
        "q.shape",
        q_BQNH.shape,
        f"one row for each of the {len(lengths_B)} slots",
    )
    refusals = {
        dispatch.KERNEL: mosaic_gpu.unsupported(q_BQNH, kv),
        dispatch.CUDNN: cudnn.unsupported(q_BQNH, options),
    }
    if implementation == "auto":
        refusals[dispatch.CUDNN] = refusals[dispatch.CUDNN] or cudnn.slower(q_BQNH)
    run = dispatch.choose("flash_decoding", implementation, IMPLEMENTATIONS, refusals)
    out_BQNH, lse_BQN = run(q_BQNH, kv, page_table_BJ, lengths_B, sinks_N, options)
    return (out_BQNH, lse_BQN) if return_lse else out_BQNH

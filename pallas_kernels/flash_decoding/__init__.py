"""Attention of a few queries per sequence over a paged cache: bound by the bytes of K and V."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from pallas_kernels import checks, dispatch
from pallas_kernels.blockwise import Options, PagedKV
from pallas_kernels.flash_decoding import config, cudnn, mosaic_gpu, reference, xla
from pallas_kernels.flash_decoding.schedule import Schedule
from pallas_kernels.flash_decoding.tree import check_tree_mask, pack_tree_mask
from pallas_kernels.flash_decoding.units import Shape
from pallas_kernels.stripe import Stripe

__all__ = ["IMPLEMENTATIONS", "Schedule", "flash_decoding", "pack_tree_mask", "plan"]

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
    k_scales_PKS: jax.Array | None = None,
    v_scales_PKS: jax.Array | None = None,
    tree_mask_BQW: jax.Array | None = None,
    schedule: Schedule | None = None,
    stripe: Stripe | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Any:  # depends on return_lse
    """Attends the last Q queries of every slot to the slot's paged keys.

    The queries of slot b are the last Q positions of its lengths[b] keys, which are in the pages already:
    query i has position p = lengths[b] - Q + i. Q is 1, or more when drafted tokens are verified. Query i sees the
    keys up to its own, or with a tree mask those on its own path.

    Args:
      q_BQNH: float32, bfloat16 or float16. For quantized pages the kernel takes it as float16 in units of 1 (float16)
        or 16 (bfloat16): a component of 2^20 or more becomes infinite.
      page_table_BJ: int32, pages within the pool; what unused columns name is never seen.
      lengths_B: int32, keys per slot; 0 marks an empty slot. A query before position 0 gets output 0.
      tree_mask_BQW: uint32 or int32, with W = ceil(Q / 32) and Q at most 128: drafted tokens that form a tree. Bit j
        of word w says whether a query sees the slot's new key 32 w + j, the one at lengths[b] - Q + 32 w + j in the
        pages; bits past Q are ignored. All keys before the new ones are seen. `pack_tree_mask` makes the words of
        booleans. A query need not see its own key. `window` goes by position in the text, which for a drafted token
        is its depth in the tree: a query with n bits is taken for the n-th on its path, at position
        lengths[b] - Q + max(n, 1) - 1, and so is the key of the same index. None is the causal mask, whose bits
        give the same result.
      schedule: from `plan`, for the same lengths, queries, heads and window; the layers of a step share one. None
        makes one here. Only the kernel needs it.
      stripe: as for `flash_attention`.
      implementation: as there; "cudnn" takes a window only with one query, and "auto" leaves one slot with up to 8192
        keys in sight, as many as the window and the page table allow, to XLA instead of cuDNN.
      The others: as for `pallas_kernels.flash_attention.flash_attention`.

    Returns:
      out_BQNH in q's dtype and, if asked for, lse_BQN in float32 (-inf where a query sees nothing).

    Raises:
      ValueError: names the argument, what it is and what is allowed; before any device work. An implementation
        asked for by name says what it cannot take.

    The kernel ("mosaic_gpu", Hopper) reads every page once for each 64 query rows of a KV head, of which there are
    Q * N / K, spread evenly over the multiprocessors whatever the lengths. Memory beyond the result is independent of
    the pool (xla and cudnn: a copy of the keys and values in sight, of 8192 keys per slot at most). Source:
    FlashDecoding (Dao et al. 2023); pages as in PagedAttention (Kwon et al. 2023).
    """
    kv = PagedKV(k_pages_PSKH, v_pages_PSKH, k_scales_PKS, v_scales_PKS)
    options = Options(scale, window, soft_cap)
    checks.check_queries(q_BQNH, "BQNH")
    checks.check_options(options)
    checks.check_attention(q_BQNH, kv, page_table_BJ, lengths_B, sinks_N, stripe)
    _check_slots(q_BQNH, lengths_B)
    if tree_mask_BQW is not None:
        checks.require_numbers(tree_mask=tree_mask_BQW)
        check_tree_mask(tree_mask_BQW, *q_BQNH.shape[:2])
    if schedule is not None:
        given = f"a {type(schedule).__name__}"
        checks.require(isinstance(schedule, Schedule), "schedule", given, "None or what `plan` gives")
        shape = Shape.of(q_BQNH, kv, page_table_BJ)
        schedule.check(slots=shape.slots, queries=shape.queries, window=window, units=shape.units)
    run = _choose(q_BQNH, kv, page_table_BJ, options, tree_mask_BQW is not None, implementation, stripe)
    arrays = kv, page_table_BJ, lengths_B, sinks_N, tree_mask_BQW, schedule
    dispatch.require_here("flash_decoding", implementation, q_BQNH, *arrays)
    if run is mosaic_gpu.flash_decoding:
        run = partial(run, schedule=schedule)
    if stripe is not None:
        run = partial(run, stripe=stripe)
    out_BQNH, lse_BQN = run(q_BQNH, kv, page_table_BJ, lengths_B, sinks_N, options, tree_mask_BQW)
    return (out_BQNH, lse_BQN) if return_lse else out_BQNH


def plan(
    q_BQNH: Any,
    k_pages_PSKH: Any,
    page_table_BJ: jax.Array,
    lengths_B: jax.Array,
    *,
    window: int | None = None,
    implementation: str = "auto",
) -> Schedule | None:
    """Which multiprocessor reads which keys in calls of `flash_decoding` with these arguments.

    Shapes and dtypes aside it depends on the lengths alone, so the layers of a step that have the window in common
    share it. For calls in a `shard_map` over heads the shapes are those of one device.

    Args:
      q_BQNH, k_pages_PSKH: as for `flash_decoding`; of these only shapes and dtypes matter, so that a
        `jax.ShapeDtypeStruct` will do.
      The others: as for `flash_decoding`.

    Returns:
      the argument `schedule` of those calls; None where another implementation than the kernel runs.

    Raises:
      ValueError: as `flash_decoding`.
    """
    kv, options = PagedKV(k_pages_PSKH, k_pages_PSKH), Options(1.0, window, None)
    checks.check_queries(q_BQNH, "BQNH")
    checks.check_options(options)
    checks.check_layout(q_BQNH, k_pages_PSKH, page_table_BJ, lengths_B)
    _check_slots(q_BQNH, lengths_B)
    if _choose(q_BQNH, kv, page_table_BJ, options, False, implementation) is not mosaic_gpu.flash_decoding:
        return None
    return mosaic_gpu.plan(lengths_B, Shape.of(q_BQNH, kv, page_table_BJ), window)


def _check_slots(q_BQNH: jax.Array, lengths_B: jax.Array) -> None:
    slots = len(lengths_B)
    checks.require(q_BQNH.shape[0] == slots, "q.shape", q_BQNH.shape, f"one row for each of the {slots} slots")


def _choose(
    q_BQNH: jax.Array, kv: PagedKV, table_BJ: jax.Array, options: Options, tree: bool, implementation: str,
    stripe: Stripe | None = None,
) -> Callable:  # fmt: skip
    striped = None if stripe is None else dispatch.Refusal("stripe", f"one of {stripe.ranks}", "None")
    refusals = {
        dispatch.KERNEL: striped or config.unsupported(q_BQNH, kv),
        dispatch.CUDNN: striped or cudnn.unsupported(q_BQNH, options, tree),
    }
    if implementation == "auto":
        keys = table_BJ.shape[1] * kv.page_size
        in_sight = min(keys, options.window + q_BQNH.shape[1] - 1) if options.window else keys
        refusals[dispatch.CUDNN] = refusals[dispatch.CUDNN] or cudnn.slower(q_BQNH, in_sight)
    return dispatch.choose("flash_decoding", implementation, IMPLEMENTATIONS, refusals)

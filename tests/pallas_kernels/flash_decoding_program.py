"""Problems of the Mosaic GPU kernel of flash_decoding, and how tests interpret it, lower it, and run it on a GPU.

The interpreter has no register operand for wgmma and no signals between CTAs, so interpreted programs set
`Config.interpretable`: weights go through shared memory, and a kernel of its own joins the parts of a unit. Loads,
schedule, masks, hand-overs and stores are those of the GPU.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise import Options, PagedKV
from pallas_kernels.flash_decoding import cudnn, flash_decoding, mosaic_gpu, xla
from pallas_kernels.flash_decoding.config import Config
from pallas_kernels.hopper import QUANTIZED_DTYPES
from tests.pallas_kernels.cases import Case, Inputs, assert_close, oracle, two_roundings
from tests.pallas_kernels.gpu_program import lower
from tests.pallas_kernels.on_a_gpu import Launch, assert_exact, untuned

KERNEL = mosaic_gpu.flash_decoding


def slots(lengths: tuple[int, ...], queries: int = 1, **sizes) -> Case:
    return Case(lengths, (queries,) * len(lengths), padding=0, **{"head_size": 64, "page_size": 64} | sizes)


# With the number of stretches: some have parts of several units, one unit is spread over many.
CAUSAL = {
    # These four in one program, of which only the lengths differ.
    "lengths around a page, units cut between stretches": (slots((200, 0, 64, 1, 129), room=300), 8),
    "empty slots, more stretches than tiles": (slots((0, 30, 0, 70, 0), room=300), 8),
    "one slot over many stretches": (slots((0, 0, 300, 0, 0), room=300), 8),
    "nothing but empty slots": (slots((0, 0, 0, 0, 0), room=300), 8),
    "drafted tokens, more queries than keys, a window over pages, soft cap, sinks": (
        slots((300, 3, 65, 0, 131), 5, page_size=16, window=70, soft_cap=2.0, sinks=True), 5,
    ),
    "a window of one key, whole units with empty stretches between": (
        slots((300, 64), g=5, kv_heads=1, page_size=32, window=1), 4,
    ),
    "more rows than a block, 71 heads on one, pages of two tiles": (
        slots((150,), 2, g=71, kv_heads=1, page_size=128), 2,
    ),
}  # fmt: skip
TREES = {
    "trees": (slots((200, 0, 70, 129, 4), 6, kv_heads=1, tree=True, page_size=16), 3),
    "trees of three words over three tiles in blocks of rows, a window, soft cap, sinks": (
        slots((193, 100), 91, g=1, kv_heads=1, tree=True, window=20, soft_cap=2.0, sinks=True), 4,
    ),
}  # fmt: skip


def interpretable(stretches: int) -> Config:
    """Two in each CTA where they are even."""
    pipelines = 1 + (stretches % 2 == 0)
    return Config(stretches // pipelines, stages=2, pipelines=pipelines, interpretable=True)


def run(implementation, inputs: Inputs, dtype, kv: PagedKV | None = None, **config):
    """The case's queries, as many in every slot; as flat rows again."""
    q, k, v, table, _, lengths = inputs.arguments(dtype)
    B, (T, N, H) = len(lengths), q.shape
    q_BQNH, options = q.reshape(B, T // B, N, H), Options(**inputs.case.options)
    kv = PagedKV(k, v) if kv is None else kv
    tree_mask, sinks = config.pop("tree_mask", inputs.tree_mask), inputs.options["sinks_N"]
    out, lse = implementation(q_BQNH, kv, table, lengths, sinks, options, tree_mask, **config)
    return out.reshape(T, N, H), lse.reshape(T, N)


def check(inputs: Inputs, dtype, **config):
    inputs.round_to(dtype)
    (out, lse), (exact_out, exact_lse) = run(KERNEL, inputs, dtype, **config), oracle(inputs)
    assert out.dtype == dtype
    assert_close([out], [exact_out], two_roundings(inputs, dtype))
    assert_close([lse], [exact_lse])


def program(q_BQNH, pages, table_BJ, lengths_B, sinks_N, tree_mask_BQW, scales_PKS, **options):
    return flash_decoding(
        q_BQNH, pages, pages, table_BJ, lengths_B, sinks_N=sinks_N, tree_mask_BQW=tree_mask_BQW, return_lse=True,
        k_scales_PKS=scales_PKS, v_scales_PKS=scales_PKS, implementation="mosaic_gpu", **options,
    )  # fmt: skip


def shapes(
    queries=1, g=4, kv_heads=2, head_size=128, page_size=64, dtype=jnp.bfloat16, sinks=False, kv_dtype=None, tree=False
):  # fmt: skip
    """Arguments of `program` that exist only as shapes."""
    heads = g * kv_heads
    return (
        jax.ShapeDtypeStruct((3, queries, heads, head_size), dtype),
        jax.ShapeDtypeStruct((9, page_size, kv_heads, head_size), kv_dtype or dtype),
        jax.ShapeDtypeStruct((3, 4), jnp.int32),
        jax.ShapeDtypeStruct((3,), jnp.int32),
        jax.ShapeDtypeStruct((heads,), jnp.float32) if sinks else None,
        jax.ShapeDtypeStruct((3, queries, -(-queries // 32)), jnp.uint32) if tree else None,
        jax.ShapeDtypeStruct((9, kv_heads, page_size), jnp.float32) if kv_dtype in QUANTIZED_DTYPES else None,
    )


def assert_lowers(options: dict[str, Any]) -> None:
    """As one kernel; `options` of the op, and sizes as of `shapes`."""
    of_op = {key: options[key] for key in ("window", "soft_cap") if key in options}
    sizes = {key: value for key, value in options.items() if key not in of_op}
    text = lower(partial(program, scale=0.1, **of_op), *shapes(**sizes))
    assert text.count("custom_call @mosaic_gpu") == 1


def assert_exact_on_a_gpu(launch: Launch) -> None:
    """As exact as XLA; where one row alone reads the keys, as cuDNN: XLA has no matmul then, and does not round the
    weights."""
    alone = launch.case.g * launch.case.queries[0] == 1
    peer = cudnn.flash_decoding if alone else untuned(xla.flash_decoding)
    assert_exact(launch, run, KERNEL, peer, beside_rounding=launch.kv_dtype is not None)

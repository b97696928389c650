"""Values of flash_attention and flash_decoding, against a float64 loop and against each other."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.blockwise import Options, PagedKV
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention import xla as attention_xla
from pallas_kernels.flash_decoding import flash_decoding
from pallas_kernels.flash_decoding import xla as decoding_xla
from tests.pallas_kernels.cases import ATOL, Case, Inputs, assert_close, oracle

PACKAGE = Path(pallas_kernels.__file__).parent
PAGE_EDGES = (0, 1, 7, 8, 9, 31, 64)
PREFILL = {
    "whole prompts, more queries than keys": Case((*PAGE_EDGES, 3, 0), (*PAGE_EDGES, 5, 2)),
    "chunk tails, soft cap": Case((64, 41, 17, 9), (5, 13, 1, 8), g=4, soft_cap=1.5),
    "window of one key, one head per group": Case((53, 8, 30, 20, 3), (19, 8, 1, 20, 1), window=1, g=1),
    "window of some pages": Case((90, 33), (9, 33), window=24, g=8),
    "sinks, odd page size": Case((23, 0, 40, 3, 12), (23, 0, 2, 5, 12), sinks=True, window=9, page_size=5),
    "nothing but padding": Case((0, 0), (0, 0)),
}


@pytest.mark.parametrize("name", PREFILL)
def test_the_reference_of_prefill_is_the_float64_loop(name):
    inputs = Inputs(PREFILL[name])
    found = flash_attention(*inputs.arguments(), **inputs.options, return_lse=True, implementation="reference")
    assert_close(found, oracle(inputs))


@pytest.mark.parametrize(
    "name", ["whole prompts, more queries than keys", "window of some pages", "nothing but padding"]
)
def test_prefill_is_the_float64_loop(name):
    inputs = Inputs(PREFILL[name])
    assert_close(flash_attention(*inputs.arguments(), **inputs.options, return_lse=True), oracle(inputs))


@pytest.mark.parametrize("name", PREFILL)
def test_prefill_in_many_tiles_and_blocks(name):
    inputs = Inputs(PREFILL[name], seed=1)
    q, k, v, table, cu_q, lengths = inputs.arguments()
    options = Options(**inputs.case.options)
    sinks = inputs.options["sinks_N"]
    found = attention_xla.flash_attention(
        q, PagedKV(k, v), table, cu_q, lengths, sinks, options,
        tile_queries=4, tiles_at_once=3, block_keys=16,
    )  # fmt: skip
    assert_close(found, oracle(inputs))


DECODE = {
    "one query, empty slots": Case((1, 0, 7, 8, 9, 31, 64, 0), (1,) * 8, g=4, padding=0, sinks=True),
    "drafted tokens": Case((37, 4, 2, 0), (4,) * 4, padding=0, g=1),
    "window and drafted tokens": Case((61, 3, 24), (3,) * 3, padding=0, window=7, soft_cap=2.0),
    "window and sinks": Case((90, 16), (1, 1), padding=0, window=16, sinks=True, g=8),
    "trees": Case((37, 64, 9, 4, 0, 43), (9,) * 6, padding=0, tree=True, sinks=True),
    "trees of two words, a window": Case((61, 90, 20), (40,) * 3, padding=0, window=3, tree=True, soft_cap=2.0, g=1),
}


def decode(inputs: Inputs, **options):
    """The case's queries through flash_decoding, as flat rows again."""
    q, k, v, table, _, lengths = inputs.arguments()
    B, (T, N, H) = len(lengths), q.shape
    out, lse = flash_decoding(
        q.reshape(B, T // B, N, H), k, v, table, lengths, tree_mask_BQW=inputs.tree_mask, return_lse=True,
        **inputs.options, **options,
    )  # fmt: skip
    return out.reshape(T, N, H), lse.reshape(T, N)


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        *(("reference", name) for name in DECODE),
        *(("xla", name) for name in ("drafted tokens", "window and sinks", "trees")),
    ],
)
def test_decoding_is_the_float64_loop(implementation, name):
    inputs = Inputs(DECODE[name])
    assert_close(decode(inputs, implementation=implementation), oracle(inputs))


@pytest.mark.parametrize("name", DECODE)
def test_decoding_in_many_blocks(name):
    inputs = Inputs(DECODE[name], seed=1)
    q, k, v, table, _, lengths = inputs.arguments()
    B, (T, N, H) = len(lengths), q.shape
    out, lse = decoding_xla.flash_decoding(
        q.reshape(B, T // B, N, H), PagedKV(k, v), table, lengths, inputs.options["sinks_N"],
        Options(**inputs.case.options), inputs.tree_mask, block_keys=16,
    )  # fmt: skip
    assert_close((out.reshape(T, N, H), lse.reshape(T, N)), oracle(inputs))


@pytest.mark.parametrize("name", ["drafted tokens", "window and sinks"])
def test_decoding_equals_the_last_rows_of_prefill(name):
    inputs = Inputs(DECODE[name], seed=2)
    assert_close(
        decode(inputs), flash_attention(*inputs.arguments(), **inputs.options, return_lse=True), atol=2 * ATOL
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_rounds_only_weights_and_output(dtype):
    """Products of 16-bit numbers are exact in float32; the weights and the output are rounded once each."""
    inputs = Inputs(PREFILL["chunk tails, soft cap"], seed=3)
    inputs.round_to(dtype)
    out = flash_attention(*inputs.arguments(dtype), **inputs.options)
    assert out.dtype == dtype
    largest_value = max(np.abs(v).max() for _, v in inputs.kv)
    two_roundings = float(jnp.finfo(dtype).eps) * float(largest_value)
    assert_close([out], oracle(inputs)[:1], atol=two_roundings + ATOL)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_quantized_pages_are_value_times_scale(dtype, implementation):
    inputs = Inputs(PREFILL["sinks, odd page size"], seed=4)
    (k, v), (k_scales, v_scales) = inputs.quantize(dtype, seed=4)
    q, _, _, *rest = inputs.arguments()
    found = flash_attention(
        q, k, v, *rest, **inputs.options, return_lse=True, implementation=implementation,
        k_scales_PKS=k_scales, v_scales_PKS=v_scales,
    )  # fmt: skip
    assert_close(found, oracle(inputs))


def test_chunks_equal_the_whole():
    whole = Inputs(Case((61, 40), (61, 40), window=11), seed=5)
    _, k, v, table, cu_q, _ = map(np.asarray, whole.arguments())
    expected = np.asarray(flash_attention(*whole.arguments(), **whole.options))
    for starts, ends in (((0, 0), (7, 3)), ((7, 3), (8, 40)), ((8, 40), (61, 40))):
        rows = np.concatenate([np.arange(cu_q[r] + starts[r], cu_q[r] + ends[r]) for r in range(2)])
        q = np.full_like(whole.q, np.nan)
        q[: len(rows)] = whole.q[rows]
        borders = np.cumsum([0, *np.subtract(ends, starts)], dtype=np.int32)
        chunk = flash_attention(q, k, v, table, borders, np.array(ends, np.int32), **whole.options)
        assert_close([chunk[: len(rows)]], [expected[rows]])


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("*/reference.py")), ids=lambda file: file.parent.name)
def test_a_specification_is_short(file):
    assert len(file.read_text().splitlines()) <= 40


def test_pages_equal_one_contiguous_page():
    paged = Inputs(Case((64, 64), (64, 10), g=4), seed=6)
    q, _, _, _, *rest = paged.arguments()
    contiguous = jnp.asarray(np.stack(paged.kv, axis=1))  # one page of 64 slots per sequence
    table = jnp.arange(2, dtype=jnp.int32)[:, None]
    assert_close(
        flash_attention(q, *contiguous, table, *rest, **paged.options, return_lse=True),
        flash_attention(*paged.arguments(), **paged.options, return_lse=True),
    )


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_parts_of_the_keys_merge_by_lse(implementation):
    """out = sum of exp(lse_i - lse) * out_i, with lse = log of the sum of exp(lse_i)."""
    inputs = Inputs(Case((61, 45), (1, 1), padding=0, g=4), seed=7)
    q, k, v, table, _, lengths = inputs.arguments()
    columns, page = 3, inputs.case.page_size
    parts = ((table[:, :columns], jnp.full_like(lengths, columns * page)), (table[:, columns:], lengths - 24))
    whole_out, whole_lse = decode(inputs, implementation=implementation)
    outs, lses = zip(
        *(
            flash_decoding(q[:, None], k, v, t, n, **inputs.options, return_lse=True, implementation=implementation)
            for t, n in parts
        ),
        strict=True,
    )
    outs, lses = ([np.asarray(part) for part in parts] for parts in (outs, lses))
    lse = np.logaddexp(*lses)
    merged = sum(np.exp(part - lse)[..., None] * out for part, out in zip(lses, outs, strict=True))
    assert_close((merged[:, 0], lse[:, 0]), (whole_out, whole_lse))

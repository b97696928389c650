"""The named problems: those that figures are promised of are there and can be run, and their work is counted right."""

from functools import partial

import jax
import pytest

from benchmarks.kernels.op import OURS
from benchmarks.kernels.ops import OPS
from benchmarks.kernels.timing import CALLS, make_program
from tests.benchmarks.tiny import DECODE, PREFILL, arguments

SHAPES = ("1x8192", "1x131072", "16x8192", "64x4096", "128x2048")
PROMISED = {
    "flash_attention": [
        *(f"llama-3-8b {x}{pages}" for x in ("4x2048", "2x4096", "1x8192", "1x16384", "1x32768")
          for pages in ("", " shuffled")),
        "mistral-7b 1x32768",
        *(f"llama-3-8b 1x{length} pages of 16" for length in (8192, 32768)),
        *(f"llama-3-8b 1x8192 {cache}" for cache in ("int8", "fp8")),
        "llama-3-8b 2048 behind 30720",
    ],
    "flash_decoding": [
        *(f"llama-3-8b {x}{pages}" for x in SHAPES for pages in ("", " pages of 16")),
        *(f"llama-3-8b 64x4096 {queries}" for queries in ("8 queries", "64 queries", "tree of 64", "120 queries")),
        "llama-3-8b 1x8192 120 queries",
        "llama-3-8b 64 from 128 to 32768",
        "llama-3-8b 64x4096 int8",
        "llama-3-8b 64x4096 fp8",
    ],
    "streaming_matmul": [
        f"llama-3-8b {w} M={M}" for w in ("qkv", "o", "up", "down", "head") for M in (1, 2, 4, 8, 16, 32, 64)
    ],
    "streaming_mlp": [f"llama-3-8b M={M}" for M in (1, 16, 32)],
    "tiled_matmul": [f"llama-3-8b {w} M={M}" for w in ("qkv", "o", "up", "down") for M in (512, 2048, 8192)],
}  # fmt: skip
CASES = [(op, name) for op in OPS for name in OPS[op].problems]


@pytest.mark.parametrize("op", OPS)
def test_promised_cases_are_named(op):
    assert {*PROMISED[op], *OPS[op].quick, *OPS[op].curve.values()} <= {*OPS[op].problems}


@pytest.mark.parametrize("op", ["flash_attention", "flash_decoding"])
def test_every_family_of_heads_is_measured(op):
    models = {name.partition(" ")[0] for name in OPS[op].problems}
    assert {"llama-3-8b", "llama-3-70b", "mixtral-8x7b", "gemma-2-9b", "qwen3-30b-a3b", "falcon-7b"} <= models


def test_peers_of_a_problem_exist():
    for op in OPS.values():
        assert OURS in op.implementations
        for problem in op.problems.values():
            assert set(op.peers(problem)) <= set(op.implementations) - {OURS}


@pytest.mark.parametrize(("op", "name"), CASES)
def test_every_problem_traces(op, name):
    """A program of its calls has one output for each."""
    shapes = jax.eval_shape(partial(OPS[op].arguments, OPS[op].problems[name]), jax.random.key(0))
    run = OPS[op].implementations["xla"](OPS[op].problems[name])
    output = jax.eval_shape(run.call, shapes)
    assert output.dtype == "bfloat16"
    assert jax.eval_shape(make_program(run), [shapes] * CALLS) == [output] * CALLS


@pytest.mark.parametrize(
    ("op", "name", "gflops", "bytes"),
    [
        # 4 B S^2 N H / 2 = 4 x 8192^2 x 32 x 128 / 2; q and out of 32 heads, k and v of 8, 8192 x 128 x 2 bytes each.
        ("flash_attention", "llama-3-8b 1x8192", 549.755813888, 80 * 8192 * 128 * 2),
        ("flash_attention", "llama-3-8b 4x2048", 137.438953472, 4 * 80 * 2048 * 128 * 2),
        # Visible: 4096^2 / 2 for the first 4096 queries, 4096 for each of the other 28672.
        ("flash_attention", "mistral-7b 1x32768", 4 * (2**23 + 4096 * 28672) * 32 * 128 / 1e9, 80 * 32768 * 128 * 2),
        # Keys in 8 bits and a float32 scale for each: 128 + 4 bytes; queries and result of 32 heads in 16 bits.
        ("flash_attention", "llama-3-8b 1x8192 int8", 549.755813888, 8192 * (64 * 256 + 16 * 132)),
        ("flash_attention", "llama-3-8b 1x8192 fp8", 549.755813888, 8192 * (64 * 256 + 16 * 132)),
        # The last 2048 queries see 30720 to 32768 keys: 31744 on the mean.
        (
            "flash_attention",
            "llama-3-8b 2048 behind 30720",
            4 * 2048 * 31744 * 32 * 128 / 1e9,
            2048 * 64 * 256 + 32768 * 16 * 256,
        ),
        # K and V: 2 x 8 heads x 128 x 2 bytes = 4096 bytes a key.
        ("flash_decoding", "llama-3-8b 64x4096", 4 * 64 * 4096 * 32 * 128 / 1e9, 64 * 4096 * 4096),
        ("flash_decoding", "llama-3-8b 1x131072 pages of 16", 4 * 131072 * 32 * 128 / 1e9, 131072 * 4096),
        # Eight queries see 4089 to 4096 keys; the keys are read once.
        ("flash_decoding", "llama-3-8b 64x4096 8 queries", 4 * 64 * 32740 * 32 * 128 / 1e9, 64 * 4096 * 4096),
        # Sixty-four see 4033 to 4096; in a binary tree their paths are 1, 2 x 2, 4 x 3, ... keys, 328 in all.
        ("flash_decoding", "llama-3-8b 64x4096 64 queries", 4 * 64 * 260128 * 32 * 128 / 1e9, 64 * 4096 * 4096),
        ("flash_decoding", "llama-3-8b 64x4096 tree of 64", 4 * 64 * 258376 * 32 * 128 / 1e9, 64 * 4096 * 4096),
        # A byte a number and a float32 scale a head: 2 x 8 x (128 + 4) bytes a key.
        ("flash_decoding", "llama-3-8b 64x4096 int8", 4 * 64 * 4096 * 32 * 128 / 1e9, 64 * 4096 * 2112),
        ("flash_decoding", "llama-3-8b 64x4096 fp8", 4 * 64 * 4096 * 32 * 128 / 1e9, 64 * 4096 * 2112),
        # The last 4096 keys of 8192 are in the window; 2 x 8 heads x 256 x 2 bytes each.
        ("flash_decoding", "gemma-2-9b 64x8192", 4 * 64 * 4096 * 16 * 256 / 1e9, 64 * 4096 * 8192),
        ("flash_decoding", "falcon-7b 64x4096", 4 * 64 * 4096 * 71 * 64 / 1e9, 64 * 4096 * 256),
    ],
)
def test_work_is_counted_as_by_hand(op, name, gflops, bytes):
    problem = OPS[op].problems[name]
    assert problem.flops == pytest.approx(gflops * 1e9, rel=1e-12)
    assert problem.bytes == bytes


def test_the_bytes_of_mixed_lengths_are_those_of_the_true_lengths():
    problem = OPS["flash_decoding"].problems["llama-3-8b 64 from 128 to 32768"]
    lengths = problem.lengths
    assert len(lengths) == 64
    assert min(lengths) >= 128
    assert max(lengths) <= 32768
    assert sorted(lengths)[31] == pytest.approx((128 * 32768) ** 0.5, rel=0.5)  # log-uniform: not the mean, 16448
    assert problem.bytes == sum(lengths) * 4096
    assert problem.lengths == lengths


@pytest.mark.parametrize(
    ("problem", "shuffled"),
    [
        (PREFILL["small 2x32"], False),
        (PREFILL["small 2x32 shuffled"], True),
        (DECODE["small 5 from 4 to 60"], True),
    ],
)
def test_every_page_of_the_pool_belongs_to_one_sequence(problem, shuffled):
    """Page 0 stands in the columns past an end."""
    found = arguments(problem)
    table = next(array for key, array in found.items() if key.startswith("page_table")).tolist()
    lengths = next(array for key, array in found.items() if key.startswith("lengths")).tolist()
    used = [row[: -(-length // problem.page_size)] for row, length in zip(table, lengths, strict=True)]
    pages = [page for row in used for page in row]
    assert sorted(pages) == [*range(1, len(found["k_pages_PSKH"]))]
    assert sum(map(sum, table)) == sum(pages)
    assert (pages != sorted(pages)) == shuffled

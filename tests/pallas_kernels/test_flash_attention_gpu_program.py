"""The Mosaic GPU kernel of flash_attention: interpreted on a CPU, lowered for a GPU, and run on one.

The interpreter has no register operand for wgmma and no named barriers, so interpreted programs set
`Config.interpretable`: weights go through shared memory, and the two products of a step do not overlap. Loads,
masks, hand-overs and stores are those of the GPU.
"""

import math
import time
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import shared_memory

from pallas_kernels.blockwise import Options, PagedKV
from pallas_kernels.flash_attention import flash_attention, mosaic_gpu, xla
from pallas_kernels.flash_attention.config import (
    Config,
    candidates,
    choose,
    for_few_queries,
    scratch,
    shared_bytes,
)
from pallas_kernels.hopper import HEAD_SIZES, QUANTIZED_DTYPES, SHARED_BYTES
from tests.pallas_kernels.cases import ATOL, Case, Inputs, assert_close, oracle, two_roundings, with_value_scales
from tests.pallas_kernels.gpu_program import array_shapes, interpreted, lower
from tests.pallas_kernels.on_a_gpu import LSE_ATOL, Launch, assert_exact, launches, untuned

# Two blocks share the work, so that a block takes more than one item and its barriers go round more than once.
INTERPRETED = Config(block_kv=64, blocks=2, interpretable=True)

# More queries than keys are in both ragged cases: without a key, and with fewer than there are queries.
CASES = {
    "ragged prompts and a chunk's tail": Case(
        (270, 70, 0, 9, 3), (133, 5, 0, 9, 5), g=1, page_size=16, kv_heads=1, head_size=64
    ),
    "window, soft cap, sinks, pages of two blocks": Case(
        (200, 150, 3, 0), (131, 9, 5, 2), g=1, page_size=128, window=70, soft_cap=2.0, sinks=True, padding=0,
        head_size=64,
    ),
    "window shorter than a page, soft cap, sinks": Case(
        (150, 30, 3), (20, 9, 5), g=2, page_size=64, window=5, soft_cap=2.0, sinks=True, padding=0, head_size=64,
    ),
}  # fmt: skip


def run(implementation, inputs: Inputs, dtype, kv: PagedKV | None = None, **config):
    q, k, v, table, cu_q, lengths = inputs.arguments(dtype)
    kv, options = PagedKV(k, v) if kv is None else kv, Options(**inputs.case.options)
    return implementation(q, kv, table, cu_q, lengths, inputs.options["sinks_N"], options, **config)


def check(launch: Launch, **config):
    inputs, kv = launch.arrays()
    out, lse = run(mosaic_gpu.flash_attention, inputs, launch.dtype, kv, **config)
    exact_out, exact_lse = oracle(inputs)
    assert out.dtype == launch.dtype
    assert_close([out], [exact_out], two_roundings(inputs, launch.dtype))
    assert_close([lse], [exact_lse])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NaN of unused slots in the interpreter's numpy
def test_interpreted_kernel_is_the_float64_loop():
    with interpreted():
        check(Launch(CASES["window shorter than a page, soft cap, sinks"], jnp.bfloat16), config=INTERPRETED)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_interpreted_kernel_with_the_sizes_of_a_gpu():
    """And nothing but padding, in the same program."""
    launch = Launch(replace(CASES["ragged prompts and a chunk's tail"], head_size=128), jnp.float16)
    config = Config(blocks=2, interpretable=True)
    with interpreted():
        check(launch, config=config)
        inputs, _ = launch.arrays()
        inputs.q[:] = np.nan
        inputs.cu_q, inputs.lengths = np.zeros_like(inputs.cu_q), np.zeros_like(inputs.lengths)
        out, lse = run(mosaic_gpu.flash_attention, inputs, launch.dtype, config=config)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "splits"),
    [("ragged prompts and a chunk's tail", 3), ("window, soft cap, sinks, pages of two blocks", 2)],
)
def test_keys_in_parts(name, splits):
    """Some parts are empty, and some rows see nothing in a part that others see."""
    with interpreted():
        check(Launch(CASES[name], jnp.bfloat16), config=replace(INTERPRETED, splits=splits))


@pytest.mark.parametrize(
    ("tokens", "heads", "keys", "splits"),
    [
        (128, 32, 32_768, 4),
        (256, 32, 32_768, 2),
        (512, 32, 32_768, 1),
        (128, 64, 131_072, 2),
        (128, 8, 131_072, 16),
        (128, 32, 2_048, 2),
        (128, 32, 512, 1),
        (8_192, 32, 131_072, 1),
    ],
)
def test_few_queries_before_long_contexts_fill_the_multiprocessors(tokens, heads, keys, splits):
    q_TNH = jax.ShapeDtypeStruct((tokens, heads, 128), jnp.bfloat16)
    assert for_few_queries(Config(), q_TNH, keys, multiprocessors=132).splits == splits


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    ("kv_dtype", "dtype", "head_size"),
    [
        ("float8_e4m3fn", jnp.float16, 256),
        ("int8", jnp.bfloat16, 96),
    ],
)
def test_interpreted_quantized_pages(kv_dtype, dtype, head_size):
    case = Case((150, 30), (70, 30), g=1, page_size=32, kv_heads=1, head_size=head_size, window=60, soft_cap=3.0)
    with interpreted():
        check(Launch(case, dtype, kv_dtype), config=INTERPRETED)


def check_small_scales(launch: Launch, lse_atol: float, **config):
    """With scales of values from 0 to where float16 has few steps, in pages of 32: weights are rounded relative to the
    largest of their products with them."""
    sizes_S = 1e-4 * 10.0 ** np.linspace(-20, 0, 32, dtype=np.float32)
    sizes_S[::5] = 0
    inputs, kv = launch.arrays()
    kv = with_value_scales(inputs, kv, sizes_S)
    out, lse = run(mosaic_gpu.flash_attention, inputs, launch.dtype, kv, **config)
    exact_out, exact_lse = oracle(inputs)
    # Of half an eps each: of weights, of outputs, and of outputs that are subnormal.
    largest_value = max(np.abs(v).max() for _, v in inputs.kv)
    assert_close([out], [exact_out], atol=float(jnp.finfo(launch.dtype).eps) * largest_value + 2.0**-25)
    assert_close([lse], [exact_lse], lse_atol)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_small_scales_are_no_danger_to_float16():
    """In each part of the keys."""
    case = Case((150, 30), (70, 30), g=1, page_size=32, kv_heads=1, head_size=64, window=90, sinks=True)
    with interpreted():
        check_small_scales(Launch(case, jnp.float16, "int8"), ATOL, config=replace(INTERPRETED, splits=2))


PLAIN = {"scale": 0.1}
EVERYTHING = {"scale": 0.1, "window": 100, "soft_cap": 30.0}


def shapes(head_size: int, page_size: int, dtype, g: int, kv_dtype=None) -> dict:
    """Arguments of the op that exist only as shapes."""
    pages = jax.ShapeDtypeStruct((9, page_size, 2, head_size), kv_dtype or dtype)
    scales = jax.ShapeDtypeStruct((9, 2, page_size), jnp.float32) if kv_dtype else None
    return {
        "q_TNH": jax.ShapeDtypeStruct((300, 2 * g, head_size), dtype),
        "k_pages_PSKH": pages,
        "v_pages_PSKH": pages,
        "page_table_RJ": jax.ShapeDtypeStruct((2, 4), jnp.int32),
        "cu_q_R1": jax.ShapeDtypeStruct((3,), jnp.int32),
        "lengths_R": jax.ShapeDtypeStruct((2,), jnp.int32),
        "k_scales_PKS": scales,
        "v_scales_PKS": scales,
        "sinks_N": None,
    }


def program(options, arguments):
    return flash_attention(**arguments, **options, return_lse=True, implementation="mosaic_gpu")


# Every head size, with pages of 16 bits and of 8 and everything; one page of 4096 is a contiguous cache.
LOWERED = [
    (64, jnp.bfloat16, None, 16, 1, EVERYTHING),
    (96, jnp.float16, None, 32, 3, PLAIN),
    (96, jnp.float16, jnp.float8_e4m3fn, 16, 1, EVERYTHING),
    (128, jnp.bfloat16, None, 4096, 4, PLAIN),
    (128, jnp.bfloat16, jnp.int8, 64, 71, EVERYTHING),
    (256, jnp.float16, None, 64, 3, EVERYTHING),
    (256, jnp.float16, jnp.float8_e4m3fn, 128, 12, PLAIN),
]


@pytest.mark.parametrize(("head_size", "dtype", "kv_dtype", "page_size", "g", "options"), LOWERED)
def test_lowers_for_a_gpu(head_size, dtype, kv_dtype, page_size, g, options):
    arguments = shapes(head_size, page_size, dtype, g, kv_dtype)
    if options == EVERYTHING:
        arguments["sinks_N"] = jax.ShapeDtypeStruct((2 * g,), jnp.float32)
    text = lower(partial(program, options), arguments)
    assert text.count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("kv_dtype", [None, jnp.int8])
def test_no_array_grows_with_the_page_table(kv_dtype):
    """Of 64 rows of a long context only the keys that are there take memory: pages and their scales stay in place."""
    rows = 64

    def sizes(columns):
        arguments = shapes(128, 16, jnp.bfloat16, 1, kv_dtype)
        arguments["page_table_RJ"] = jax.ShapeDtypeStruct((rows, columns), jnp.int32)
        arguments["lengths_R"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
        arguments["cu_q_R1"] = jax.ShapeDtypeStruct((rows + 1,), jnp.int32)
        found = {math.prod(shape) for shape in array_shapes(partial(program, PLAIN), arguments)}
        assert rows * columns in found
        return found - {rows * columns}

    assert sizes(30_001) == sizes(60_001)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "q.dtype is float32; allowed: bfloat16, float16"),
        ({"head_size": 80}, r"q.shape is \(300, 4, 80\); allowed: head sizes 64, 96, 128, 256"),
        ({"page_size": 24}, r"k_pages.shape is \(9, 24, 2, 64\); allowed: slots of a page: multiples of 8"),
        ({"kv_dtype": jnp.float8_e5m2}, "k_pages.dtype is float8_e5m2; allowed: bfloat16, int8, float8_e4m3fn"),
        ({"scale": -1.0}, "scale is -1.0; allowed: above 0"),
    ],
)
def test_what_the_kernel_cannot_take_it_says_by_name(change, reason):
    options = {"scale": change.get("scale", 0.1)}
    sizes = {"head_size": 64, "page_size": 16, "dtype": jnp.bfloat16, "g": 2} | change
    sizes.pop("scale", None)
    with pytest.raises(ValueError, match=f"implementation='mosaic_gpu' of flash_attention cannot run: .*{reason}"):
        jax.eval_shape(partial(program, options), shapes(**sizes))


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("kv_dtype", [None, jnp.int8])
@pytest.mark.parametrize("page_size", [16, 128])
def test_every_config_that_may_be_used_fits(head_size, kv_dtype, page_size):
    arguments = shapes(head_size, page_size, jnp.bfloat16, 1, kv_dtype)
    q, k, scales = arguments["q_TNH"], arguments["k_pages_PSKH"], arguments["k_scales_PKS"]
    possible = candidates(q, PagedKV(k, k, scales, scales))
    assert choose(q, PagedKV(k, k, scales, scales)) in possible
    for config in (*possible, *(replace(config, splits=2) for config in possible)):
        assert shared_bytes(scratch(config, head_size, page_size, q.dtype, k.dtype)) <= SHARED_BYTES


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("config", [Config(), Config(splits=2)])
def test_rows_that_are_copied_alone_begin_where_tma_can_read(head_size, kv_dtype, config):
    """Those of 96 numbers would not, and faulted on the card: they are in no tiles, and no TMA copies them."""
    out = scratch(config, head_size, 16, jnp.dtype(jnp.bfloat16), jnp.dtype(kv_dtype))["out"]
    assert not out.transforms or out.shape[-1] * out.dtype.itemsize % 128 == 0


@pytest.mark.parametrize(
    "size", [{"block_q": 96}, {"block_kv": 96}, {"stages": 1}, {"stages": 4}, {"blocks": 0}, {"splits": 17}]
)
def test_a_config_that_cannot_be_names_what_is_wrong(size):
    ((name, value),) = size.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; allowed"):
        Config(**size)


# test_gpu_cases.py says what is covered together. Each comes in bfloat16 and float16 by turns.
ON_A_GPU = {
    "edges of pages of 16": Case((0, 1, 15, 16, 17, 257), (0, 1, 15, 16, 17, 257), g=1, page_size=16, head_size=64),
    "edges of pages of 64": Case((63, 64, 65, 1009), (63, 64, 65, 499), g=2, page_size=64, sinks=True, head_size=128),
    "edges of pages of 128": Case(
        (127, 128, 129), (127, 1, 129), g=3, page_size=128, window=31, soft_cap=9.0, head_size=256
    ),
    "primes": Case((1009, 499, 2), (1009, 7, 2), g=4, page_size=32, soft_cap=30.0, head_size=64),
    "window of one key": Case((300, 77), (300, 77), g=5, page_size=32, window=1, sinks=True, head_size=128),
    "window over blocks": Case((1500, 333), (700, 20), g=7, page_size=16, window=301, head_size=128),
    "eight heads a group": Case((700, 300), (300, 300), g=8, page_size=64, window=128, sinks=True, head_size=64),
    "twelve heads a group": Case(
        (611,), (611,), g=12, page_size=128, kv_heads=1, sinks=True, soft_cap=5.0, head_size=256
    ),
    "many heads": Case((401,), (150,), g=32, page_size=32, kv_heads=1, window=200, head_size=256),
    "71 heads": Case((401,), (150,), g=71, page_size=16, kv_heads=1, head_size=64),
    "a long context": Case((131_072,), (64,), g=4, page_size=64, kv_heads=1, head_size=128),
    "more queries than keys": Case((3, 0, 12), (5, 2, 12), g=4, page_size=16, sinks=True, head_size=128),
    "heads of 96": Case((1009, 65, 64, 7, 2), (499, 65, 64, 7, 1), g=3, page_size=16, sinks=True, head_size=96),
    "heads of 96, a window": Case((1500, 333), (700, 20), g=1, page_size=64, window=301, head_size=96),
    "split keys, soft cap": Case((9001, 300), (40, 30), g=4, page_size=128, soft_cap=30.0, window=5000, head_size=128),
    "split keys, sinks": Case((9001, 33, 32, 31), (40, 32, 32, 31), g=2, page_size=32, sinks=True, head_size=96),
    "heads of 96, soft cap": Case((600, 77), (300, 77), g=2, page_size=16, soft_cap=9.0, head_size=96),
    "heads of 96, pages of 128": Case((600, 77), (300, 77), g=3, page_size=128, head_size=96),
    "heads of 256, soft cap": Case((600, 77), (300, 77), g=2, page_size=64, soft_cap=30.0, head_size=256),
}
QUANTIZED_ON_A_GPU = {
    "pages of 128, soft cap": Case((1009, 127, 3), (300, 127, 3), g=4, page_size=128, soft_cap=30.0, head_size=64),
    "split keys in pages of 32": Case((5009, 64, 3), (99, 64, 3), g=4, page_size=32, sinks=True, head_size=96),
    "pages of 64, a window": Case((1500, 64, 3), (499, 64, 3), g=4, page_size=64, window=700, head_size=128),
    "split keys, a window": Case(
        (5009, 64, 3), (199, 64, 3), g=4, page_size=16, window=1300, sinks=True, head_size=256
    ),
}
LAUNCHES = launches(ON_A_GPU) | launches(QUANTIZED_ON_A_GPU, QUANTIZED_DTYPES)


@pytest.mark.parametrize("slow", [1, 2])
def test_a_slow_consumer_misses_no_signal(monkeypatch, slow):
    """Whatever a warpgroup does late, the others must not run ahead of it by more than the barriers can tell."""
    original = shared_memory.Barrier.wait

    def wait(self, thread, *arguments, **options):
        if f"warpgroup_id={slow}" in str(thread):
            time.sleep(0.03)
        return original(self, thread, *arguments, **options)

    monkeypatch.setattr(shared_memory.Barrier, "wait", wait)
    with interpreted():
        check(Launch(CASES["window shorter than a page, soft cap, sinks"], jnp.bfloat16), config=INTERPRETED)


@pytest.mark.parametrize("name", [name for name in LAUNCHES if "split keys" in name])
def test_keys_are_split_on_a_gpu(name):
    case, dtype, _ = LAUNCHES[name]
    q_TNH = jax.ShapeDtypeStruct((case.tokens, case.kv_heads * case.g, case.head_size), dtype)
    assert for_few_queries(Config(), q_TNH, case.columns * case.page_size, multiprocessors=132).splits > 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAUNCHES)
def test_on_a_gpu_as_exact_as_xla_and_the_same_twice(name):
    launch = LAUNCHES[name]
    lse_atol = LSE_ATOL if launch.kv_dtype is None or launch.case.soft_cap else ATOL
    assert_exact(launch, run, mosaic_gpu.flash_attention, untuned(xla.flash_attention), lse_atol=lse_atol)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", QUANTIZED_DTYPES)
def test_small_scales_on_a_gpu_are_no_danger_to_float16(kv_dtype):
    """In the program of the launch."""
    launch = LAUNCHES[f"split keys in pages of 32, {kv_dtype}"]
    assert launch.dtype == jnp.float16
    check_small_scales(launch, LSE_ATOL)

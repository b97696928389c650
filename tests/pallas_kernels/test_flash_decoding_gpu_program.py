"""The Mosaic GPU kernel of flash_decoding: interpreted on a CPU, lowered for a GPU, and run on one.

The interpreter has no register operand for wgmma and no signals between CTAs, so interpreted programs set
`Config.interpretable`: weights go through shared memory, and a kernel of its own joins the parts of a unit. Loads,
schedule, masks, hand-overs and stores are those of the GPU.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_LAYOUT, TiledLayout

from pallas_kernels.blockwise import Options, PagedKV
from pallas_kernels.flash_decoding import flash_decoding, mosaic_gpu, pack_tree_mask, plan, quantized
from pallas_kernels.flash_decoding.choice import SHARED_MEMORY, candidates, choose, shared_memory
from pallas_kernels.flash_decoding.config import HEAD_SIZES, QUANTIZED_DTYPES, TILE_KEYS, Config
from pallas_kernels.flash_decoding.units import Shape
from tests.pallas_kernels.cases import ATOL, Case, Inputs, assert_close, oracle
from tests.pallas_kernels.gpu_program import interpreted, lower


def run(implementation, inputs: Inputs, dtype, kv: PagedKV | None = None, **config):
    """The case's queries, as many in every slot, through an implementation; as flat rows again."""
    q, k, v, table, _, lengths = inputs.arguments(dtype)
    B, (T, N, H) = len(lengths), q.shape
    q_BQNH, options = q.reshape(B, T // B, N, H), Options(**inputs.case.options)
    kv = PagedKV(k, v) if kv is None else kv
    tree_mask = config.pop("tree_mask", inputs.tree_mask)
    out, lse = implementation(q_BQNH, kv, table, lengths, inputs.options["sinks_N"], options, tree_mask, **config)
    return out.reshape(T, N, H), lse.reshape(T, N)


def check(inputs: Inputs, dtype, **config):
    """Products of 16-bit numbers are exact in float32; the weights and the output are rounded once each."""
    inputs.round_to(dtype)
    (out, lse), (exact_out, exact_lse) = run(mosaic_gpu.flash_decoding, inputs, dtype, **config), oracle(inputs)
    largest_value = max(np.nan_to_num(np.abs(kv[1])).max(initial=0) for kv in inputs.kv)
    assert out.dtype == dtype
    assert_close([out], [exact_out], atol=float(jnp.finfo(dtype).eps) * largest_value + ATOL)
    assert_close([lse], [exact_lse])


def quantized_pages(inputs: Inputs, dtype, kv_dtype) -> PagedKV:
    """The case's pages in 8 bits; the oracle sees the queries as `dtype`, and the keys that those bits mean."""
    inputs.q = np.asarray(jnp.asarray(inputs.q, dtype), np.float32)
    (k, v), (k_scales, v_scales) = inputs.quantize(kv_dtype)
    return PagedKV(k, v, k_scales, v_scales)


def check_quantized(inputs: Inputs, dtype, kv_dtype, **config):
    """8 bits and queries are exact in float16; a scale multiplies float32, the weights are rounded to float16."""
    kv = quantized_pages(inputs, dtype, kv_dtype)
    (out, lse), (exact_out, exact_lse) = run(mosaic_gpu.flash_decoding, inputs, dtype, kv, **config), oracle(inputs)
    largest_value = max(np.nanmax(np.abs(x[1]), initial=0) for x in inputs.kv)  # what is never seen is NaN
    rounding = float(jnp.finfo(dtype).eps) + float(
        jnp.finfo(jnp.float16).eps
    )  # each of half an eps, of outputs, weights
    assert out.dtype == dtype
    assert_close([out], [exact_out], atol=rounding / 2 * largest_value + ATOL)
    assert_close([lse], [exact_lse])


def slots(lengths: tuple[int, ...], queries: int = 1, **sizes) -> Case:
    return Case(lengths, (queries,) * len(lengths), padding=0, **{"head_size": 64, "page_size": 64} | sizes)


# With the number of CTAs: one has all units, some have parts of several, one unit is spread over many.
CASES = {
    "lengths around a page, one CTA": (slots((200, 0, 64, 1, 129)), 1),
    "units cut between CTAs": (slots((200, 0, 64, 1, 129)), 3),
    "one unit over many CTAs": (slots((700,), kv_heads=1, g=1), 5),
    "more CTAs than tiles": (slots((30, 70), kv_heads=1, g=3, page_size=16), 7),
    "drafted tokens, soft cap, sinks": (slots((200, 2, 65), 3, page_size=16, soft_cap=2.0, sinks=True), 5),
    "a window over pages": (slots((300, 40, 131), 2, page_size=16, window=70, sinks=True), 4),
    "a window of one key": (slots((300, 64), page_size=32, window=1, g=5, kv_heads=1), 2),
    "pages of two tiles": (slots((150, 260), g=3, kv_heads=1, page_size=128), 2),
    "more rows than a block": (slots((90,), 20, g=4, kv_heads=1), 2),
    "71 heads on one": (slots((90, 7), g=71, kv_heads=1), 2),
    "more queries than keys": (slots((3, 0, 12), 5, page_size=16, sinks=True), 2),
    "trees": (slots((200, 0, 70, 129, 4), 6, tree=True, page_size=16), 3),
    "trees, a window, soft cap, sinks": (slots((300, 66, 131), 7, tree=True, window=5, soft_cap=2.0, sinks=True), 4),
    "trees of two words in blocks of rows": (slots((150, 90), 40, g=4, kv_heads=1, tree=True, window=70), 3),
    "trees over three tiles": (slots((193,), 128, g=1, kv_heads=1, tree=True), 2),
}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NaN of unused slots in the interpreter's numpy
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_is_the_float64_loop(name):
    case, ctas = CASES[name]
    with interpreted():
        check(Inputs(case), jnp.bfloat16, config=Config(ctas, stages=2, interpretable=True))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("config", [Config(2, 4, 2, 2, True), Config(2, 3, 1, 1, True)])
def test_interpreted_kernel_with_other_layouts(config):
    with interpreted():
        check(Inputs(slots((300, 70, 450), g=1, kv_heads=1, head_size=128)), jnp.float16, config=config)


QUANTIZED = {
    "int8, units cut between CTAs": (CASES["units cut between CTAs"], jnp.bfloat16, "int8", 2),
    "fp8, a window over pages": (CASES["a window over pages"], jnp.bfloat16, "float8_e4m3fn", 2),
    "fp8, drafted tokens, soft cap": (CASES["drafted tokens, soft cap, sinks"], jnp.float16, "float8_e4m3fn", 2),
    "int8, more rows than a block": (CASES["more rows than a block"], jnp.float16, "int8", 2),
    "fp8, trees, a window": (CASES["trees, a window, soft cap, sinks"], jnp.bfloat16, "float8_e4m3fn", 2),
    "int8, trees in blocks of rows": (CASES["trees of two words in blocks of rows"], jnp.bfloat16, "int8", 2),
    "int8, more queries than keys": (CASES["more queries than keys"], jnp.bfloat16, "int8", 2),
    "fp8, heads of 96 in pages of 8": (
        (slots((200, 0, 70), g=3, kv_heads=1, head_size=96, page_size=8), 2), jnp.bfloat16, "float8_e4m3fn", 1,
    ),
    "int8, heads of 256 in pages of 128": (
        (slots((300,), g=2, kv_heads=1, head_size=256, page_size=128), 2), jnp.float16, "int8", 2,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", QUANTIZED)
def test_interpreted_quantized_pages(name):
    (case, ctas), dtype, kv_dtype, consumers = QUANTIZED[name]
    config = Config(ctas, stages=2, consumers=consumers, interpretable=True)
    with interpreted():
        check_quantized(Inputs(case), dtype, kv_dtype, config=config)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_scales_of_any_size_are_no_danger_to_float16():
    """Scales from 0 to 1e20: the weights are rounded relative to the largest of their products with them."""
    inputs = Inputs(slots((90,), g=2, kv_heads=1))
    kv = quantized_pages(inputs, jnp.bfloat16, "int8")
    sizes_S = 10.0 ** np.linspace(-20, 20, 64, dtype=np.float32)
    sizes_S[::5] = 0
    v_scales = kv.v_scales_PKS * sizes_S[None, None]
    inputs.kv[0][1] *= np.resize(sizes_S, 90)[:, None, None]
    exact_out, exact_lse = oracle(inputs)
    with interpreted():
        config = Config(2, stages=2, interpretable=True)
        kv = PagedKV(kv.k_PSKH, kv.v_PSKH, kv.k_scales_PKS, v_scales)
        out, lse = run(mosaic_gpu.flash_decoding, inputs, jnp.bfloat16, kv, config=config)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact_out, rtol=0, atol=0.01 * np.abs(exact_out).max())
    assert_close([lse], [exact_lse])


def held(layout: TiledLayout, shape: tuple[int, int]) -> np.ndarray:
    """What a warpgroup's threads hold of an array in a layout, as flat indices: [thread, *registers, vector]."""
    x = np.arange(shape[0] * shape[1]).reshape(shape)
    for tile in layout.tiling.tiles:
        outer, inner = x.shape[: -len(tile)], x.shape[-len(tile) :]
        cut = x.reshape(*outer, *(part for n, size in zip(inner, tile, strict=True) for part in (n // size, size)))
        numbers, sizes = (range(len(outer) + i, cut.ndim, 2) for i in range(2))
        x = cut.transpose(*range(len(outer)), *numbers, *sizes)
    dims = (*layout.warp_dims, *layout.lane_dims)
    threads = np.moveaxis(x, dims, range(len(dims)))
    return threads.reshape(128, *layout.registers_shape(shape), layout.vector_length)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_threads_hold_the_operands_that_the_tensor_cores_read(head_size, monkeypatch):
    """With lists of numbers in the place of registers: what becomes of those of a tile, where wgmma wants which."""
    monkeypatch.setattr(quantized, "_words", lambda x: [x[i : i + 4] for i in range(0, len(x), 4)])
    monkeypatch.setattr(quantized, "_convert", lambda word, dtype: [word[:2], word[2:]])
    padded = lambda word: [*word, *[None] * (4 - len(word))]  # noqa: E731
    choose_bytes = lambda words, order: [(padded(words[0]) + padded(words[1]))[i] for i in order]  # noqa: E731
    monkeypatch.setattr(quantized, "_permuted", choose_bytes)
    monkeypatch.setattr(quantized, "_lower_half", lambda word: [*word[:2], -1, -1])
    monkeypatch.setattr(quantized, "_one", lambda pair, i: [pair[i]])
    monkeypatch.setattr(quantized, "_joined", lambda numbers: [n for number in numbers for n in number])

    def registers(numbers: np.ndarray) -> np.ndarray:
        lists = np.empty(numbers.shape[:-1], object)
        for index in np.ndindex(*lists.shape):
            lists[index] = numbers[index].tolist()
        return lists

    def numbers(registers: np.ndarray) -> np.ndarray:
        return np.array([list(x) for x in registers.flat]).reshape(*registers.shape, -1)

    H, M, N = head_size, quantized.value_rows(head_size), 24
    tile, rows = (TILE_KEYS, H), (N, H)
    in_order = np.asarray(quantized.in_key_order(jnp.arange(TILE_KEYS * H).reshape(tile))).ravel()
    values = np.full((M, TILE_KEYS), -2)
    key_layout, value_layout = quantized.key_layout(H), quantized.value_layout(H)
    for thread in range(128):
        found = quantized.key_registers(registers(held(key_layout, tile)[thread]), H, None)
        np.testing.assert_array_equal(numbers(found), in_order[held(WGMMA_LAYOUT, tile)[thread]])
        found = quantized.value_registers(registers(held(value_layout, tile)[thread]), H, None, None)
        values.flat[held(WGMMA_LAYOUT, values.shape)[thread]] = numbers(found)

    # A row of the values is one component of all keys, in order; as many are left over as M is more than H.
    component = values[:, 0]
    keys = np.arange(TILE_KEYS)
    np.testing.assert_array_equal(values, np.where(component[:, None] < 0, -1, component[:, None] + keys * H))
    assert sorted(component) == [*[-1] * (M - H), *range(H)]
    sums = np.where(component[:, None] < 0, -1, component[:, None] + np.arange(N) * H).ravel()
    for thread in range(128):
        found = quantized.row_registers(registers(sums[held(WGMMA_LAYOUT, (M, N))[thread]]), N, H)
        np.testing.assert_array_equal(numbers(found), held(value_layout, rows)[thread])


def causal_bits(slots: int, queries: int) -> jax.Array:
    return pack_tree_mask(jnp.broadcast_to(jnp.tri(queries, dtype=jnp.bool_), (slots, queries, queries)))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("window", [None, 3])
def test_causal_bits_are_the_causal_mask(window):
    inputs = Inputs(slots((200, 66, 3), 5, g=1, kv_heads=1, window=window))
    config = Config(2, stages=2, interpretable=True)
    with interpreted():
        with_bits, without = (
            run(mosaic_gpu.flash_decoding, inputs, jnp.bfloat16, config=config, tree_mask=bits)
            for bits in (causal_bits(3, 5), None)
        )
    for x, y in zip(with_bits, without, strict=True):
        np.testing.assert_array_equal(x, y)


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


LOWERED = {
    "Llama-3-8B": {},
    "Llama-3-8B, 8 drafted tokens": {"queries": 8, "kv_heads": 8},
    "Gemma-2": {"head_size": 256, "g": 2, "window": 100, "soft_cap": 50.0},
    "gpt-oss": {"head_size": 64, "g": 8, "window": 128, "sinks": True, "page_size": 16},
    "Falcon": {"head_size": 64, "g": 71, "kv_heads": 1, "page_size": 32},
    "lookahead": {"queries": 120, "page_size": 128, "dtype": jnp.float16},
    "Phi-3-mini": {"head_size": 96, "g": 1, "kv_heads": 8},
    "Phi-3-mini, 8 drafted tokens in pages of 16": {"head_size": 96, "g": 1, "queries": 8, "page_size": 16},
    "Llama-3-8B, int8": {"kv_dtype": "int8"},
    "Llama-3-8B, fp8": {"kv_dtype": "float8_e4m3fn"},
    "Llama-3-8B, fp8, 8 drafted tokens in pages of 16": {
        "kv_dtype": "float8_e4m3fn",
        "queries": 8,
        "kv_heads": 8,
        "page_size": 16,
    },
    "Phi-3-mini, fp8": {"head_size": 96, "g": 1, "kv_heads": 8, "kv_dtype": "float8_e4m3fn", "page_size": 8},
    "Phi-3-mini, int8": {"head_size": 96, "g": 1, "kv_heads": 8, "kv_dtype": "int8", "dtype": jnp.float16},
    "Gemma-2, int8": {"head_size": 256, "g": 2, "window": 100, "soft_cap": 50.0, "kv_dtype": "int8"},
    "gpt-oss, fp8": {"head_size": 64, "g": 8, "window": 128, "sinks": True, "kv_dtype": "float8_e4m3fn"},
    "lookahead, int8": {"queries": 120, "page_size": 128, "dtype": jnp.float16, "kv_dtype": "int8"},
    "gpt-oss, fp8, a tree of 8": {
        "queries": 8,
        "g": 8,
        "head_size": 64,
        "window": 128,
        "sinks": True,
        "tree": True,
        "kv_dtype": "float8_e4m3fn",
    },
    "everything, int8": {
        "queries": 3,
        "g": 3,
        "head_size": 256,
        "page_size": 16,
        "sinks": True,
        "window": 9,
        "soft_cap": 2.0,
        "kv_dtype": "int8",
    },
    "everything": {
        "queries": 3,
        "g": 3,
        "head_size": 256,
        "page_size": 16,
        "sinks": True,
        "window": 9,
        "soft_cap": 2.0,
    },
    "Llama-3-8B, a tree of 64": {"queries": 64, "kv_heads": 8, "tree": True},
    "gpt-oss, a tree of 8": {"queries": 8, "g": 8, "head_size": 64, "window": 128, "sinks": True, "tree": True},
    "Gemma-2, a tree of 33": {
        "queries": 33,
        "g": 2,
        "head_size": 256,
        "page_size": 16,
        "window": 100,
        "soft_cap": 50.0,
        "tree": True,
    },
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_a_gpu_as_one_kernel(name):
    options = {key: LOWERED[name][key] for key in ("window", "soft_cap") if key in LOWERED[name]}
    sizes = {key: value for key, value in LOWERED[name].items() if key not in options}
    text = lower(partial(program, scale=0.1, **options), *shapes(**sizes))
    assert text.count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "q.dtype is float32; allowed: bfloat16, float16"),
        ({"head_size": 80}, "head size is 80; allowed: 64, 96, 128, 256"),
        ({"page_size": 24}, "pages hold 24 tokens; allowed: 8, 16, 32 and multiples of 64"),
        ({"kv_dtype": jnp.float16}, "k_pages.dtype is float16; allowed: bfloat16, int8, float8_e4m3fn"),
    ],
)
def test_what_the_kernel_cannot_take_it_says_by_name(change, reason):
    with pytest.raises(ValueError, match=f"implementation='mosaic_gpu' of flash_decoding cannot run: .*{reason}"):
        jax.eval_shape(partial(program, scale=0.1), *shapes(**change))


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("kv_dtype", ["bfloat16", *QUANTIZED_DTYPES])
@pytest.mark.parametrize("queries", [1, 64])
def test_the_chosen_config_fits(head_size, kv_dtype, queries):
    shape = Shape(3, queries, 2, 2, head_size, 16, 9, jnp.dtype(jnp.bfloat16), jnp.dtype(kv_dtype))
    config = choose(shape, 132)
    assert config in candidates(shape, 132)
    assert shared_memory(shape, config) <= SHARED_MEMORY
    # By Little's law, 4.5 TB/s through 132 multiprocessors at a latency of 1 us are 34 KB under way to each.
    assert 2 * config.stages * TILE_KEYS * head_size * shape.kv_dtype.itemsize >= 48 * 1024


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ctas": 0}, "ctas is 0; allowed: at least 1"),
        ({"stages": 1}, "stages is 1; allowed: at least 2"),
        ({"consumers": 3}, "consumers is 3; allowed: 1 or 2"),
        ({"stages": 5}, "stages is 5; allowed: multiples of the 2 consumers"),
    ],
)
def test_a_config_that_cannot_be_names_what_is_wrong(sizes, message):
    with pytest.raises(ValueError, match=message):
        Config(**{"ctas": 4, "stages": 4} | sizes)


# Every page size, group, head size, dtype and option; lengths around pages, primes, and one of 131,072.
ON_A_GPU = {
    "edges of pages of 16": slots((0, 1, 15, 16, 17, 257), g=1, page_size=16),
    "edges of pages of 64": slots((63, 64, 65, 1009, 0, 2), 4, g=2, head_size=128, sinks=True),
    "edges of pages of 128": slots((127, 128, 129), 2, g=3, head_size=256, page_size=128, window=31, soft_cap=9.0),
    "primes": slots((1009, 499, 2, 8191), g=4, head_size=128, page_size=32, soft_cap=30.0),
    "a window of one key": slots((300, 77), g=5, head_size=128, page_size=32, window=1, sinks=True),
    "a window over tiles": slots((1500, 333, 8000), 3, g=7, head_size=128, page_size=16, window=301),
    "eight heads a group": slots((700, 300), 8, g=8, window=128, sinks=True),
    "twelve heads a group": slots((611, 0, 5), g=12, head_size=256, page_size=128, kv_heads=1, soft_cap=5.0),
    "lookahead": slots((401, 1500), 120, g=4, head_size=128, kv_heads=1),
    "many heads": slots((401, 3), 2, g=32, page_size=32, kv_heads=1, window=200),
    "71 heads": slots((401, 1009), g=71, page_size=16, kv_heads=1),
    "a long context": slots((131_072,), g=4, head_size=128, kv_heads=1),
    "heads of 96": slots((63, 64, 65, 1009, 0, 2), 4, g=3, head_size=96, page_size=16, sinks=True),
    "heads of 96, a window": slots((1500, 333, 8000), g=1, head_size=96, window=301),
    "trees": slots((1009, 7, 64, 130, 0, 700), 8, g=4, head_size=128, page_size=16, tree=True),
    "trees, a window and sinks": slots((333, 1500, 65), 33, g=8, window=128, sinks=True, kv_heads=1, tree=True),
    "trees of 128 and a short window": slots((1009, 200), 128, g=2, head_size=256, kv_heads=1, window=9, tree=True),
    "very different lengths": slots((1, 32_768, 128, 7000, 64, 0, 513, 2048), g=4, head_size=128, kv_heads=1),
}  # fmt: skip


def rms(x, exact) -> float:
    return float(np.sqrt(np.mean((np.asarray(x, np.float64) - exact) ** 2)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
def test_on_a_gpu_as_exact_as_16_bits_allow_and_the_same_twice(name):
    """XLA is no measure for one query: it fuses the second product and leaves out the rounding of the weights."""
    dtype = (jnp.bfloat16, jnp.float16)[list(ON_A_GPU).index(name) % 2]
    inputs = Inputs(ON_A_GPU[name])
    inputs.round_to(dtype)
    out, lse = run(mosaic_gpu.flash_decoding, inputs, dtype)
    exact_out, exact_lse = oracle(inputs)
    assert rms(out, exact_out) <= 1.1 * rms(oracle(inputs, dtype)[0], exact_out)
    assert_close([lse], [exact_lse], atol=1e-3)  # tanh.approx and ex2.approx: 2^-11 and 2^-22 of scores up to soft_cap
    again = run(mosaic_gpu.flash_decoding, inputs, dtype)
    np.testing.assert_array_equal(out, again[0])
    np.testing.assert_array_equal(lse, again[1])


QUANTIZED_ON_A_GPU = {
    "edges of pages of 8": slots((0, 1, 7, 8, 9, 257), g=1, page_size=8),
    "edges of pages of 64": slots((63, 64, 65, 1009, 0, 2), 4, g=2, head_size=128, sinks=True),
    "edges of pages of 128": slots((127, 128, 129), 2, g=3, head_size=256, page_size=128, window=31, soft_cap=9.0),
    "heads of 96": slots((1009, 499, 2, 8191), g=4, head_size=96, page_size=16),
    "a window over tiles": slots((1500, 333, 8000), 3, g=7, head_size=128, page_size=16, window=301),
    "lookahead": slots((401, 1500), 120, g=4, head_size=128, kv_heads=1, page_size=32),
    "trees": slots((1009, 7, 64, 130, 0, 700), 8, g=4, head_size=128, page_size=16, tree=True),
    "trees, a window and sinks": slots((333, 1500, 65), 33, g=8, window=128, sinks=True, kv_heads=1, tree=True),
    "many rows of wide heads": slots((401, 64), 16, g=4, head_size=256, kv_heads=1),
    "a long context": slots((131_072,), g=4, head_size=128, kv_heads=1),
    "very different lengths": slots((1, 32_768, 128, 7000, 64, 0, 513, 2048), g=4, head_size=128, kv_heads=1),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", QUANTIZED_ON_A_GPU)
@pytest.mark.parametrize("kv_dtype", QUANTIZED_DTYPES)
def test_quantized_pages_on_a_gpu(name, kv_dtype):
    """The weights are rounded to float16, whatever the dtype of the queries."""
    dtype = (jnp.bfloat16, jnp.float16)[list(QUANTIZED_ON_A_GPU).index(name) % 2]
    inputs = Inputs(QUANTIZED_ON_A_GPU[name])
    kv = quantized_pages(inputs, dtype, kv_dtype)
    out, lse = run(mosaic_gpu.flash_decoding, inputs, dtype, kv)
    exact_out, exact_lse = oracle(inputs)
    assert rms(out, exact_out) <= 1.1 * rms(oracle(inputs, dtype)[0], exact_out)
    assert_close([lse], [exact_lse], atol=1e-3)
    again = run(mosaic_gpu.flash_decoding, inputs, dtype, kv)
    np.testing.assert_array_equal(out, again[0])
    np.testing.assert_array_equal(lse, again[1])


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3, 100])
def test_on_a_gpu_causal_bits_are_the_causal_mask(window):
    inputs = Inputs(slots((1009, 66, 3, 640), 33, g=4, head_size=128, window=window))
    with_bits, without = (
        run(mosaic_gpu.flash_decoding, inputs, jnp.bfloat16, tree_mask=bits) for bits in (causal_bits(4, 33), None)
    )
    for x, y in zip(with_bits, without, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.gpu
def test_on_a_gpu_calls_share_a_schedule():
    """Units are cut between CTAs, whose tickets every call has to leave as it found them."""
    inputs = Inputs(slots((1009, 499, 2, 8191), g=4, head_size=128))
    q, k, v, table, _, lengths = inputs.arguments(jnp.bfloat16)

    @partial(jax.jit, static_argnames="shared")
    def four_layers(q_BQNH, shared: bool):
        call = partial(flash_decoding, scale=0.1, implementation="mosaic_gpu")
        schedule = plan(q_BQNH, k, table, lengths, implementation="mosaic_gpu") if shared else None
        results = [q_BQNH]
        for _ in range(4):
            results.append(call(results[-1], k, v, table, lengths, schedule=schedule))
        return results

    for x, y in zip(four_layers(q[:, None], True), four_layers(q[:, None], False), strict=True):
        np.testing.assert_array_equal(x, y)

"""The Mosaic GPU kernel of flash_decoding with 8-bit pages: their values become operands in registers."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_LAYOUT, TiledLayout

from pallas_kernels.flash_decoding import quantized
from pallas_kernels.flash_decoding.config import TILE_KEYS
from pallas_kernels.hopper import HEAD_SIZES, QUANTIZED_DTYPES
from tests.pallas_kernels.cases import ATOL, Inputs, assert_close, oracle, quantized_pages, with_value_scales
from tests.pallas_kernels.flash_decoding_program import (
    CAUSAL,
    KERNEL,
    TREES,
    assert_exact_on_a_gpu,
    assert_lowers,
    interpretable,
    run,
    slots,
)
from tests.pallas_kernels.gpu_program import interpreted
from tests.pallas_kernels.on_a_gpu import launches


def check_quantized(inputs: Inputs, dtype, kv_dtype, **config):
    """8 bits and queries are exact in float16; a scale multiplies float32, the weights are rounded to float16."""
    kv = quantized_pages(inputs, dtype, kv_dtype)
    (out, lse), (exact_out, exact_lse) = run(KERNEL, inputs, dtype, kv, **config), oracle(inputs)
    largest_value = max(np.nanmax(np.abs(x[1]), initial=0) for x in inputs.kv)  # what is never seen is NaN
    # Each of half an eps: of outputs, of weights.
    rounding = float(jnp.finfo(dtype).eps) + float(jnp.finfo(jnp.float16).eps)
    assert out.dtype == dtype
    assert_close([out], [exact_out], atol=rounding / 2 * largest_value + ATOL)
    assert_close([lse], [exact_lse])


CUT = CAUSAL["lengths around a page, units cut between stretches"]
QUANTIZED = {
    "int8": (CUT, jnp.bfloat16, "int8"),
    "fp8, trees in blocks of rows": (
        TREES["trees of three words over three tiles in blocks of rows, a window, soft cap, sinks"], jnp.bfloat16,
        "float8_e4m3fn",
    ),
    "fp8, heads of 96 in pages of 8, a window over pages, more queries than keys": (
        (slots((210, 20, 0, 1), 2, g=3, kv_heads=1, head_size=96, page_size=8, window=130, sinks=True), 2),
        jnp.bfloat16, "float8_e4m3fn",
    ),
    "int8, heads of 256 in pages of 128, more rows than a block": (
        (slots((150,), 2, g=33, kv_heads=1, head_size=256, page_size=128), 2), jnp.float16, "int8",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", QUANTIZED)
def test_interpreted_quantized_pages(name):
    (case, stretches), dtype, kv_dtype = QUANTIZED[name]
    with interpreted():
        check_quantized(Inputs(case), dtype, kv_dtype, config=interpretable(stretches))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_scales_of_any_size_are_no_danger_to_float16():
    """Scales from 0 to 1e20: the weights are rounded relative to the largest of their products with them."""
    case, stretches = CUT
    inputs = Inputs(case)
    kv = quantized_pages(inputs, jnp.bfloat16, "int8")
    sizes_S = 10.0 ** np.linspace(-20, 20, 64, dtype=np.float32)
    sizes_S[::5] = 0
    kv = with_value_scales(inputs, kv, sizes_S)
    exact_out, exact_lse = oracle(inputs)
    with interpreted():
        out, lse = run(KERNEL, inputs, jnp.bfloat16, kv, config=interpretable(stretches))
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


LOWERED = {
    "Phi-3-mini, int8": {"head_size": 96, "g": 1, "kv_heads": 8, "kv_dtype": "int8", "dtype": jnp.float16},
    "lookahead, fp8": {"queries": 120, "page_size": 128, "dtype": jnp.float16, "kv_dtype": "float8_e4m3fn"},
    "fp8, a tree of 3, a window, sinks": {
        "queries": 3,
        "g": 3,
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
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_a_gpu_as_one_kernel(name):
    assert_lowers(LOWERED[name])


ON_A_GPU = {
    "edges of pages of 8": slots((0, 1, 7, 8, 9, 257), g=1, page_size=8),
    "edges of pages of 64": slots((63, 64, 65, 1009, 0, 2), 4, g=2, head_size=128, sinks=True),
    "edges of pages of 128": slots((127, 128, 129), 2, g=3, head_size=256, page_size=128, window=31, soft_cap=9.0),
    "heads of 96": slots((1009, 499, 2, 8191), g=4, head_size=96, page_size=32),
    "a window over tiles": slots((1500, 333, 8000), 3, g=7, head_size=128, page_size=16, window=301),
    "lookahead": slots((401, 1500), 120, g=4, head_size=128, kv_heads=1, page_size=32),
    "trees": slots((1009, 7, 64, 130, 0, 700), 8, g=4, head_size=128, page_size=16, tree=True),
    "trees, a window and sinks": slots((333, 1500, 65), 33, g=8, window=128, sinks=True, kv_heads=1, tree=True),
    "many rows of wide heads": slots((401, 64), 16, g=4, head_size=256, kv_heads=1),
    "a long context": slots((131_072,), g=4, head_size=128, kv_heads=1),
    "very different lengths": slots(
        (1, 32_768, 128, 7000, 64, 0, 513, 2048), g=4, head_size=128, kv_heads=1, page_size=128
    ),
}  # fmt: skip
LAUNCHES = launches(ON_A_GPU, QUANTIZED_DTYPES)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAUNCHES)
def test_quantized_pages_on_a_gpu(name):
    """The weights are rounded to float16, whatever the dtype of the queries."""
    assert_exact_on_a_gpu(LAUNCHES[name])

"""The Mosaic GPU kernel of flash_decoding with tree masks."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_decoding import pack_tree_mask
from tests.pallas_kernels.cases import Inputs
from tests.pallas_kernels.flash_decoding_program import (
    KERNEL,
    TREES,
    assert_exact_on_a_gpu,
    assert_lowers,
    check,
    interpretable,
    run,
    slots,
)
from tests.pallas_kernels.gpu_program import interpreted
from tests.pallas_kernels.on_a_gpu import assert_the_same, launches


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NaN of unused slots in the interpreter's numpy
@pytest.mark.parametrize("name", TREES)
def test_interpreted_kernel_is_the_float64_loop(name):
    case, stretches = TREES[name]
    with interpreted():
        check(Inputs(case), jnp.bfloat16, config=interpretable(stretches))


def causal_bits(slots: int, queries: int) -> jax.Array:
    return pack_tree_mask(jnp.broadcast_to(jnp.tri(queries, dtype=jnp.bool_), (slots, queries, queries)))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_causal_bits_are_the_causal_mask():
    """With a window that ends among the new queries; on a GPU with others too."""
    case, stretches = TREES["trees of three words over three tiles in blocks of rows, a window, soft cap, sinks"]
    inputs, bits = Inputs(replace(case, tree=False)), causal_bits(len(case.lengths), case.queries[0])
    inputs.round_to(jnp.bfloat16)
    with interpreted():
        with_bits, without = (
            run(KERNEL, inputs, jnp.bfloat16, config=interpretable(stretches), tree_mask=mask) for mask in (bits, None)
        )
    assert_the_same(with_bits, without)


LOWERED = {
    "Llama-3-8B, a tree of 64": {"queries": 64, "kv_heads": 8, "tree": True},
    "everything": {
        "queries": 33,
        "g": 2,
        "head_size": 256,
        "page_size": 16,
        "window": 100,
        "soft_cap": 50.0,
        "sinks": True,
        "tree": True,
    },
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_a_gpu_as_one_kernel(name):
    assert_lowers(LOWERED[name])


ON_A_GPU = {
    "trees": slots((1009, 7, 64, 130, 0, 700), 8, g=4, head_size=128, page_size=16, tree=True),
    "trees, a window and sinks": slots((333, 1500, 65), 33, g=8, window=128, sinks=True, kv_heads=1, tree=True),
    "trees of 128 and a short window": slots((1009, 200), 128, g=2, head_size=256, kv_heads=1, window=9, tree=True),
    "trees, heads of 96, pages of 128": slots((1009, 129, 7), 8, g=3, head_size=96, page_size=128, tree=True),
    "trees, soft cap": slots((1009, 31, 32, 33), 8, g=2, head_size=256, page_size=32, soft_cap=30.0, tree=True),
}  # fmt: skip
LAUNCHES = launches(ON_A_GPU)
CAUSAL_BITS = {window: slots((1009, 66, 3, 640), 33, g=4, head_size=128, window=window) for window in (None, 3, 100)}


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAUNCHES)
def test_on_a_gpu_as_exact_as_others_and_the_same_twice(name):
    assert_exact_on_a_gpu(LAUNCHES[name])


@pytest.mark.gpu
@pytest.mark.parametrize("window", CAUSAL_BITS)
def test_on_a_gpu_causal_bits_are_the_causal_mask(window):
    """But for the last bit here and there: in two programs the compiler fuses other products with sums."""
    inputs = Inputs(CAUSAL_BITS[window])
    (out, lse), (expected, expected_lse) = (
        [np.asarray(x, np.float32) for x in run(KERNEL, inputs, jnp.bfloat16, tree_mask=bits)]
        for bits in (causal_bits(4, 33), None)
    )
    rounding = 1e-6  # of what is of size one in float32, before it is rounded to bfloat16
    np.testing.assert_allclose(lse, expected_lse, rtol=rounding, atol=rounding)
    np.testing.assert_allclose(out, expected, rtol=float(jnp.finfo(jnp.bfloat16).eps), atol=rounding)
    assert np.mean(out != expected) < 1e-3

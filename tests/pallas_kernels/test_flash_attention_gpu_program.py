"""The Mosaic GPU kernel of flash_attention: interpreted on a CPU, lowered for a GPU, and run on one.

The interpreter has no register operand for wgmma and no named barriers, so interpreted programs set
`Config.interpretable`: weights go through shared memory, and the two products of a step do not overlap. Loads,
masks, hand-overs and stores are those of the GPU.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.blockwise import Options, PagedKV
from pallas_kernels.flash_attention import mosaic_gpu
from pallas_kernels.flash_attention.config import (
    Config,
)
from tests.pallas_kernels.cases import ATOL, Case, Inputs, assert_close, oracle
from tests.pallas_kernels.gpu_program import interpreted

# Two blocks share the work, so that a block takes more than one item and its barriers go round more than once.
INTERPRETED = Config(block_kv=64, blocks=2, interpretable=True)

CASES = {
    "ragged prompts and a chunk's tail": Case((133, 70, 0, 9), (133, 5, 0, 9), g=3, page_size=16, kv_heads=1),
    "window, soft cap, sinks": Case(
        (200, 150), (150, 40), g=1, page_size=64, window=70, soft_cap=2.0, sinks=True, padding=0
    ),
    "window shorter than a page": Case((150, 30), (20, 30), g=4, page_size=64, window=5, kv_heads=1),
    "more queries than keys": Case((3, 0, 12), (5, 2, 12), g=1, page_size=16, sinks=True, kv_heads=1),
    "nothing but padding": Case((0, 0), (0, 0), g=1, kv_heads=1),
    "pages of two blocks": Case((150, 260), (40, 3), g=1, page_size=128),
}


def run(inputs: Inputs, dtype, config: Config | None = None):
    q, k, v, table, cu_q, lengths = inputs.arguments(dtype)
    return mosaic_gpu.flash_attention(
        q, PagedKV(k, v), table, cu_q, lengths, inputs.options["sinks_N"], Options(**inputs.case.options),
        config=config,
    )  # fmt: skip


def check(inputs: Inputs, dtype, config: Config | None = None):
    """Products of 16-bit numbers are exact in float32; the weights and the output are rounded once each."""
    inputs.round_to(dtype)
    (out, lse), (exact_out, exact_lse) = run(inputs, dtype, config), oracle(inputs)
    largest_value = max(np.abs(kv[1]).max(initial=0) for kv in inputs.kv)
    assert out.dtype == dtype
    assert_close([out], [exact_out], atol=float(jnp.finfo(dtype).eps) * largest_value + ATOL)
    assert_close([lse], [exact_lse])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NaN of unused slots in the interpreter's numpy
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_is_the_float64_loop(name):
    with interpreted():
        check(Inputs(replace(CASES[name], head_size=64)), jnp.bfloat16, INTERPRETED)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(("head_size", "dtype"), [(96, jnp.float16), (128, jnp.bfloat16), (256, jnp.bfloat16)])
def test_interpreted_head_sizes(head_size, dtype):
    case = Case((70, 9), (67, 9), g=1, page_size=32, kv_heads=1, head_size=head_size)
    with interpreted():
        check(Inputs(case), dtype, INTERPRETED)

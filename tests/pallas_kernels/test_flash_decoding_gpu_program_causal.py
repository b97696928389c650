"""The Mosaic GPU kernel of flash_decoding with a causal mask and 16-bit pages, and its configs."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.flash_decoding import flash_decoding, plan
from pallas_kernels.flash_decoding.choice import candidates, choose, shared_memory
from pallas_kernels.flash_decoding.config import TILE_KEYS, Config
from pallas_kernels.flash_decoding.units import Shape
from pallas_kernels.hopper import HEAD_SIZES, QUANTIZED_DTYPES, SHARED_BYTES
from tests.pallas_kernels.cases import Inputs
from tests.pallas_kernels.flash_decoding_program import (
    CAUSAL,
    assert_exact_on_a_gpu,
    assert_lowers,
    check,
    interpretable,
    program,
    shapes,
    slots,
)
from tests.pallas_kernels.gpu_program import interpreted
from tests.pallas_kernels.on_a_gpu import assert_the_same, launches


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NaN of unused slots in the interpreter's numpy
@pytest.mark.parametrize("name", CAUSAL)
def test_interpreted_kernel_is_the_float64_loop(name):
    case, stretches = CAUSAL[name]
    with interpreted():
        check(Inputs(case), jnp.bfloat16, config=interpretable(stretches))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_interpreted_kernel_with_another_layout():
    """One stretch has all units."""
    config = Config(1, stages=3, q_buffers=1, pipelines=1, interpretable=True)
    with interpreted():
        check(Inputs(slots((300, 70, 450), g=5, kv_heads=1, head_size=128, page_size=32)), jnp.float16, config=config)


LOWERED = {
    "Llama-3-8B, 8 drafted tokens in pages of 128": {"queries": 8, "kv_heads": 8, "page_size": 128},
    "71 heads on one, in blocks of rows": {
        "g": 71,
        "kv_heads": 1,
        "head_size": 64,
        "page_size": 32,
        "dtype": jnp.float16,
        "sinks": True,
        "window": 128,
    },
    "Phi-3-mini, 8 drafted tokens in pages of 16": {"head_size": 96, "g": 1, "queries": 8, "page_size": 16},
    "everything": {
        "queries": 3,
        "g": 3,
        "head_size": 256,
        "sinks": True,
        "window": 9,
        "soft_cap": 2.0,
    },
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_a_gpu_as_one_kernel(name):
    assert_lowers(LOWERED[name])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "q.dtype is float32; allowed: bfloat16, float16"),
        ({"head_size": 80}, r"q.shape is \(.*, 80\); allowed: head sizes 64, 96, 128, 256"),
        (
            {"page_size": 24},
            r"k_pages.shape is \(9, 24, 2, 128\); allowed: slots of a page: 8, 16, 32 and multiples of 64",
        ),
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
    assert shared_memory(shape, config) <= SHARED_BYTES
    # By Little's law, 4.5 TB/s through 132 multiprocessors at a latency of 1 us are 34 KB under way to each.
    assert 2 * config.pipelines * config.stages * TILE_KEYS * head_size * shape.kv_dtype.itemsize >= 48 * 1024


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ctas": 0}, "ctas is 0; allowed: at least 1"),
        ({"stages": 1}, "stages is 1; allowed: at least 2"),
        ({"pipelines": 3}, "pipelines is 3; allowed: 1 or 2"),
    ],
)
def test_a_config_that_cannot_be_names_what_is_wrong(sizes, message):
    with pytest.raises(ValueError, match=message):
        Config(**{"ctas": 4, "stages": 4} | sizes)


# test_gpu_cases.py says what is covered together. Each comes in bfloat16 and float16 by turns.
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
    "mostly empty slots": slots((0,) * 20 + (700,) + (0,) * 11 + (65, 3) + (0,) * 300, g=4, head_size=128, sinks=True),
    "very different lengths": slots((1, 32_768, 128, 7000, 64, 0, 513, 2048), g=4, head_size=128, kv_heads=1),
    "sinks and soft cap": slots((1009, 0, 333), 2, g=4, window=300, sinks=True, soft_cap=30.0),
    "sinks, pages of 128": slots((1009, 127, 3), g=4, page_size=128, sinks=True),
    "heads of 96, soft cap": slots((1009, 0, 333), g=4, head_size=96, page_size=16, soft_cap=30.0),
    "heads of 256, sinks": slots((1009, 16, 333), 3, g=2, head_size=256, page_size=16, sinks=True),
}  # fmt: skip
LAUNCHES = launches(ON_A_GPU)
SHARED = slots((1009, 499, 2, 8191), g=4, head_size=128)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAUNCHES)
def test_on_a_gpu_as_exact_as_others_and_the_same_twice(name):
    assert_exact_on_a_gpu(LAUNCHES[name])


@pytest.mark.gpu
def test_on_a_gpu_calls_share_a_schedule():
    """Units are cut between CTAs, whose tickets every call has to leave as it found them."""
    inputs = Inputs(SHARED)
    q, k, v, table, _, lengths = inputs.arguments(jnp.bfloat16)

    @partial(jax.jit, static_argnames="shared")
    def four_layers(q_BQNH, shared: bool):
        call = partial(flash_decoding, scale=0.1, implementation="mosaic_gpu")
        schedule = plan(q_BQNH, k, table, lengths, implementation="mosaic_gpu") if shared else None
        results = [q_BQNH]
        for _ in range(4):
            results.append(call(results[-1], k, v, table, lengths, schedule=schedule))
        return results

    assert_the_same(four_layers(q[:, None], True), four_layers(q[:, None], False))

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.cache import CACHE_DTYPES, make_cache
from jaxinfer.decode.layout import Layout
from jaxinfer.engine import Options
from jaxinfer.engine.paging import Paging
from jaxinfer.model.config import MoEConfig
from jaxinfer.model.model import Model
from jaxinfer.parallel import make_mesh
from jaxinfer.roofline.hardware import DATASHEETS
from jaxinfer.roofline.memory import page_bytes, plan_memory, sequence_bytes, weight_memory
from jaxinfer.roofline.precision import BF16, Precision
from jaxinfer.roofline.precision import CACHE_DTYPES as PLANNED_DTYPES
from jaxinfer.roofline.shapes import parameters
from tests.roofline.small import small, sparse, windowed

WINDOWED = small(layers=windowed(None, 20, 20))
SPARSE = sparse(MoEConfig(8, 2, 32, bias=True))
VARIANTS = {
    "windows": WINDOWED,
    "experts with biases": dataclasses.replace(WINDOWED, layers=SPARSE, sinks=True, qkv_bias=True, o_bias=True),
    "plain MLP, layer norms": dataclasses.replace(
        WINDOWED, gated_mlp=False, mlp_bias=True, norm="layer", norm_bias=True
    ),
    "four norms, tied": dataclasses.replace(WINDOWED, post_norm=True, tied_embeddings=True, qk_norm="head"),
    "norms over all heads": dataclasses.replace(WINDOWED, pre_norm=False, post_norm=True, qk_norm="all"),
    "parallel block": dataclasses.replace(WINDOWED, num_kv_heads=1, parallel_block=True),
}
PUBLISHED = {  # parameters, as the model cards and the sizes of the checkpoints state them
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-2-13b": 13_015_864_320,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-0.6b": 596_049_920,
    "gemma-2-9b": 9_241_705_984,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_checkpoint(published, name):
    assert parameters(published(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_those_of_the_model(name):
    arrays = Model(VARIANTS[name], make_mesh()).parameters.values()
    assert parameters(VARIANTS[name]) == sum(array.size for array in arrays)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_weights_are_those_that_one_device_holds(devices):
    arrays = Model(WINDOWED, make_mesh(devices)).parameters.values()
    held = sum(int(np.prod(array.sharding.shard_shape(array.shape))) * 2 for array in arrays)
    assert weight_memory(WINDOWED, BF16, devices) == held


def test_the_dtypes_of_a_cache_are_those_that_the_cost_model_knows():
    assert tuple(PLANNED_DTYPES) == CACHE_DTYPES


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_page_bytes_are_those_of_the_cache(devices, dtype):
    pages, page_size, mesh = (5, 3), 8, make_mesh(devices)
    groups = tuple(WINDOWED.group(layer) for layer in range(WINDOWED.num_layers))
    slots = max(WINDOWED.num_kv_heads, devices)
    cache = make_cache(mesh, groups, pages, page_size, slots, WINDOWED.head_size, dtype)
    held = sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(cache))
    precision = Precision.all_in("bfloat16", dtype)
    sizes = [page_bytes(WINDOWED, window, page_size, precision, devices) for window in WINDOWED.windows]
    assert sum(count * size for count, size in zip(pages, sizes, strict=True)) == held


@given(tokens=st.integers(1, 500), page_size=st.sampled_from([1, 8, 16]), chunk=st.sampled_from([1, 64, 100]))
def test_a_sequence_is_planned_with_the_pages_that_the_engine_gives_it(tokens, page_size, chunk):
    layout = Layout(4, page_size, (9,) * len(WINDOWED.windows), WINDOWED.context, "bfloat16")
    paging = Paging(layout, WINDOWED.windows, sharing=True)
    expected = sum(
        paging.most(group, tokens, chunk) * page_bytes(WINDOWED, window, page_size, BF16)
        for group, window in enumerate(WINDOWED.windows)
    )
    assert sequence_bytes(WINDOWED, tokens, page_size, chunk, BF16) == expected


def test_a_plan_is_made_for_the_engines_own_options():
    arguments = (WINDOWED, DATASHEETS["t4"], 8, 512)
    options = Options()
    expected = plan_memory(*arguments, page_size=options.page_size, chunk=options.max_num_batched_tokens)
    assert plan_memory(*arguments) == expected


@pytest.mark.parametrize(("card", "gigabytes"), [("a100-40", 10), ("a100-80", 50)])
def test_a_13b_model_leaves_the_known_room_for_its_cache(published, card, gigabytes):
    plan = plan_memory(published("llama-2-13b"), DATASHEETS[card], batch=1, context=2048, chunk=8192)
    assert plan.cache / 1e9 == pytest.approx(gigabytes, abs=1.5)
    assert plan.per_token == 40 * 2 * 5120 * 2  # 819 kB, as Kwon et al. 2023, section 3


@given(batch=st.integers(1, 200), context=st.integers(1, 4096))
def test_what_fits_fills_the_memory_and_one_more_does_not(batch, context):
    plan = plan_memory(WINDOWED, DATASHEETS["t4"], batch, context)
    used = plan.reserved + plan.weights + plan.activations
    assert used + plan.sequences * plan.per_sequence <= plan.memory
    assert used + (plan.sequences + 1) * plan.per_sequence > plan.memory
    assert plan.fits == (batch <= plan.sequences)


def test_weights_that_are_too_large_leave_room_for_nothing(published):
    plan = plan_memory(published("llama-3-70b"), DATASHEETS["h100"], batch=1, context=128)
    assert plan.cache < 0
    assert (plan.sequences, plan.fits) == (0, False)
    assert plan_memory(published("llama-3-70b"), DATASHEETS["h100"], 1, 128, tensor_parallel=4).fits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch is 0; it must be at least 1"),
        ({"page_size": 0}, "page_size is 0; it must be at least 1"),
        ({"memory_fraction": 1.5}, r"memory_fraction is 1\.5; it must be above 0 and at most 1"),
        ({"tensor_parallel": 3}, "tensor_parallel is 3; it must divide vocab_size 512 and divide num_heads 8"),
    ],
)
def test_bad_input_is_refused(changes, message):
    arguments = {"batch": 1, "context": 16} | changes
    with pytest.raises(ValueError, match=message):
        plan_memory(WINDOWED, DATASHEETS["t4"], **arguments)

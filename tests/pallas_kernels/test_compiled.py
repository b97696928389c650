"""What the ops compile to: their memory, the arrays they build, their use inside a mesh and a model."""

import math
import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention import problems as attention
from pallas_kernels.flash_decoding import flash_decoding
from pallas_kernels.flash_decoding import problems as decoding
from pallas_kernels.models import Heads
from tests.pallas_kernels.gpu_program import array_shapes

HEADS = Heads(query_heads=15, kv_heads=3, head_size=24)
KERNEL_HEADS, KERNEL_LENGTHS = Heads(query_heads=8, kv_heads=2, head_size=128), (16_384, 65_536)
OPS = {"prefill": (flash_attention, attention.Problem), "decode": (flash_decoding, decoding.Problem)}
SCALE = 0.2


def shapes(problem, pool: int | None = None, dtype=jnp.float32):
    q, k, v, *rest = jax.eval_shape(lambda key: problem.inputs(key, jnp.dtype(dtype)), jax.random.key(0))
    pages = [jax.ShapeDtypeStruct((pool or x.shape[0], *x.shape[1:]), x.dtype) for x in (k, v)]
    return q, *pages, *rest


def temporary_bytes(op, *args) -> int:
    return jax.jit(partial(op, scale=SCALE)).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_prefill_memory_beyond_the_result_is_independent_of_the_prompt():
    short, long = (
        temporary_bytes(flash_attention, *shapes(attention.Problem(HEADS, 1, length))) for length in (2048, 8192)
    )
    assert long <= 1.1 * short


def test_prefill_memory_is_independent_of_the_layers():
    """Nothing waits in memory for a layer to come, though it needs only what is known at the start."""
    q_TNH, k_PSKH, v_PSKH, *rest = shapes(attention.Problem(HEADS, 8, 256))

    def attend(layers, q_TNH, k_LPSKH, v_LPSKH, *rest, scale):
        for layer in range(layers):
            q_TNH = flash_attention(q_TNH, k_LPSKH[layer], v_LPSKH[layer], *rest, scale=scale)
        return q_TNH

    def bytes_of(layers: int) -> int:
        pools = ([pool] * layers for pool in (k_PSKH, v_PSKH))
        return temporary_bytes(partial(attend, layers), q_TNH, *pools, *rest)

    assert bytes_of(6) - bytes_of(2) < q_TNH.size * q_TNH.dtype.itemsize


@pytest.mark.parametrize("name", OPS)
def test_memory_is_independent_of_the_pool(name):
    op, problem = OPS[name]
    small, large = (temporary_bytes(op, *shapes(problem(HEADS, 2, 256, 8), pool)) for pool in (100, 100_000))
    assert large == small


def test_decode_memory_is_bounded_by_a_block():
    short, long = (
        temporary_bytes(flash_decoding, *shapes(decoding.Problem(HEADS, 1, length))) for length in (8192, 65536)
    )
    assert long <= 1.1 * short


def kernel(name: str) -> Callable:
    return partial(OPS[name][0], implementation="mosaic_gpu", scale=SCALE)


def kernel_arguments(name: str, length: int):
    """Of one sequence: a prompt, or a slot with one query."""
    return shapes(OPS[name][1](KERNEL_HEADS, 1, length), dtype=jnp.bfloat16)


@pytest.mark.parametrize("name", OPS)
def test_no_array_of_the_kernels_program_grows_with_the_square_of_the_length(name):
    """But for the comparison of tiles with tiles that sorts them, which XLA never writes to memory."""
    shapes_of = (array_shapes(kernel(name), *kernel_arguments(name, length)) for length in KERNEL_LENGTHS)
    growth = {(math.prod(after) / math.prod(before), after) for before, after in zip(*shapes_of, strict=True)}
    linear, tiles = KERNEL_LENGTHS[1] / KERNEL_LENGTHS[0], 514
    assert any(0.99 * linear < times <= linear for times, _ in growth)
    assert {shape for times, shape in growth if times > linear} <= {(tiles, tiles)}


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "growth"), [("prefill", KERNEL_LENGTHS[1] / KERNEL_LENGTHS[0]), ("decode", 1)])
def test_on_a_gpu_memory_of_the_kernels_program_is_linear_in_its_queries(name, growth):
    short, long = (temporary_bytes(kernel(name), *kernel_arguments(name, length)) for length in KERNEL_LENGTHS)
    assert 0 < long <= 1.02 * growth * short


@pytest.mark.parametrize("name", OPS)
def test_grouped_heads_share_keys_and_values(name):
    """No array has an axis of keys, the head size, and the query heads (15, or 3 and 5 apart) as well."""
    op, problem = OPS[name]
    args = shapes(problem(HEADS, 2, 7 * 11, 7))
    text = jax.jit(partial(op, scale=SCALE)).lower(*args).compile().as_text()
    arrays = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
    keys = {array for array in arrays if {7, 11, 77} & set(array) and 24 in array}
    assert any({3, 24} <= set(array) for array in keys), "the gathered keys should be among the arrays"
    assert not [array for array in keys if {5, 15} & set(array)]


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("name", OPS)
def test_heads_shard_over_a_mesh(name):
    """Inside a shard_map over heads, with replicated page tables, the result is that of one device."""
    op, problem = OPS[name]
    heads = Heads(query_heads=4, kv_heads=2, head_size=16)
    # More than one block of keys each, so that their loops are part of it.
    shape = problem(heads, 1, 600 if name == "prefill" else 8193)
    inputs = jax.jit(lambda key: shape.inputs(key, jnp.dtype(jnp.float32)))(jax.random.key(0))
    specs = (
        P(*([None] * (inputs[0].ndim - 2)), "tensor"),
        *[P(None, None, "tensor")] * 2,
        *[P()] * (len(inputs) - 3),
    )
    run = partial(op, scale=SCALE)
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.jit(jax.shard_map(run, in_specs=specs, out_specs=specs[0]))
        placed = jax.tree.map(lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s)), inputs, specs)
        found = sharded(*placed)
    np.testing.assert_allclose(np.asarray(found), np.asarray(run(*inputs)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_layers_share_one_function(name):
    op, problem = OPS[name]

    def three_layers(q, *rest):
        for _ in range(3):
            q = op(q, *rest, scale=SCALE)
        return q

    text = jax.jit(three_layers).lower(*shapes(problem(HEADS, 2, 32))).as_text()
    functions = re.findall(rf"func.func private @({op.__name__}\w*)\(", text)
    assert functions == [op.__name__]


@pytest.mark.parametrize("name", [*attention.PROBLEMS])
def test_named_prefill_problems_are_valid(name):
    check_problem(flash_attention, attention.PROBLEMS[name])


@pytest.mark.parametrize("name", [*decoding.PROBLEMS])
def test_named_decoding_problems_are_valid(name):
    check_problem(flash_decoding, decoding.PROBLEMS[name])


def check_problem(op, problem):
    arguments = jax.eval_shape(lambda key: problem.arguments(key, jnp.dtype(jnp.bfloat16)), jax.random.key(0))
    out = jax.eval_shape(partial(op, **problem.heads.options), **arguments)
    assert out.shape == next(x.shape for name, x in arguments.items() if name.startswith("q_"))

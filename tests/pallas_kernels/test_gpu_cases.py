"""What the GPU tests of the kernels cover, and how many kernels they need for it."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import IMPLEMENTATIONS
from pallas_kernels.flash_attention import mosaic_gpu as attention
from pallas_kernels.flash_decoding import mosaic_gpu as decoding
from pallas_kernels.streaming_matmul import IMPLEMENTATIONS as OF_PRODUCTS
from pallas_kernels.streaming_matmul import MLP_IMPLEMENTATIONS as OF_ROWS
from pallas_kernels.streaming_matmul import mosaic_gpu as matmul
from pallas_kernels.streaming_matmul.arguments import W_AXES
from pallas_kernels.streaming_matmul.config import Shape, config_for
from tests.pallas_kernels import flash_decoding_program as decoding_program
from tests.pallas_kernels import matmul_cases as products
from tests.pallas_kernels import sanitized
from tests.pallas_kernels import test_compiled as memory
from tests.pallas_kernels import test_flash_attention_gpu_program as prefill
from tests.pallas_kernels import test_flash_decoding_gpu_program_causal as causal
from tests.pallas_kernels import test_flash_decoding_gpu_program_quantized as quantized
from tests.pallas_kernels import test_flash_decoding_gpu_program_tree as tree
from tests.pallas_kernels import test_streaming_matmul as of_products
from tests.pallas_kernels import test_streaming_mlp as of_rows
from tests.pallas_kernels.on_a_gpu import DTYPES, Launch, Shapes

LAUNCHES = {
    "prefill": [*prefill.LAUNCHES.values()],
    "decoding": [launch for tests in (causal, quantized, tree) for launch in tests.LAUNCHES.values()],
}
OF_BOTH = {
    "head size": {64, 96, 128, 256},
    "page size": {16, 32, 64, 128},
    "dtype": set(DTYPES),
    "dtype of pages": {None, "int8", "float8_e4m3fn"},
    "window": {False, True},
    "soft cap": {False, True},
    "sinks": {False, True},
}
OPTIONS = {"prefill": OF_BOTH, "decoding": OF_BOTH | {"tree": {False, True}}}


def options_of(launch: Launch) -> dict:
    case = launch.case
    return {
        "head size": case.head_size,
        "page size": case.page_size,
        "dtype": launch.dtype,
        "dtype of pages": launch.kv_dtype,
        "window": case.window is not None,
        "soft cap": case.soft_cap is not None,
        "sinks": case.sinks,
        "tree": case.tree,
    }


@pytest.mark.parametrize("op", LAUNCHES)
def test_every_two_options_meet(op):
    found = [options_of(launch) for launch in LAUNCHES[op]]
    for one, other in itertools.combinations(OPTIONS[op], 2):
        met = {(options[one], options[other]) for options in found}
        assert {*itertools.product(OPTIONS[op][one], OPTIONS[op][other])} <= met, (one, other)


@pytest.mark.parametrize("op", LAUNCHES)
def test_lengths_and_groups(op):
    """Around a page of every size, primes, and a long one; heads in groups of all models."""
    cases = [launch.case for launch in LAUNCHES[op]]
    for size in OF_BOTH["page size"]:
        lengths = {length for case in cases if case.page_size == size for length in case.lengths}
        assert {size - 1, size, size + 1} <= lengths, size
    assert {0, 1, 499, 1009, 131_072} <= {length for case in cases for length in case.lengths}
    assert {1, 2, 3, 4, 5, 7, 8, 12, 32, 71} <= {case.g for case in cases}


OF_A_PRODUCT = {
    "axes": set(W_AXES),
    "tokens": {"one", "up to 8", "more"},
    "dtype": {products.BF16, products.F16},
    "float32 result": {False, True},
    "parts of D": {"one", "smem", "gmem"},  # or where the sums of several meet
    **{extra: {False, True} for extra in ("norm", "bias", "residual")},
}


def options_of_a_product(case: products.Case, config) -> dict:
    return {
        "axes": case.w_axes,
        "tokens": "one" if case.tokens == 1 else "up to 8" if case.tokens <= 8 else "more",
        "dtype": case.dtype,
        "float32 result": case.out_dtype == jnp.float32,
        "parts of D": "one" if config.split == 1 else config.exchange,
        **{extra: extra in case.extras for extra in ("norm", "bias", "residual")},
    }


def exists(options: dict) -> bool:
    """Weights of experts have no residual, and the kernel no norm in float16."""
    if options.get("residual"):
        return "E" not in options.get("axes", "")
    return not options.get("norm") or options.get("dtype") != products.F16


def test_every_two_options_of_a_product_meet():
    cases = (products.INTERPRETED | products.PAIRED).values()
    found = [options_of_a_product(case, case.config) for case in cases]
    for case in of_products.ON_A_GPU.values():
        shape = Shape.of(jax.eval_shape(partial(products.arguments, case)))
        found.append(options_of_a_product(case, config_for(shape)))
    assert all(map(exists, found))
    for one, other in itertools.combinations(OF_A_PRODUCT, 2):
        wanted = itertools.product(OF_A_PRODUCT[one], OF_A_PRODUCT[other])
        met = {(options[one], options[other]) for options in found}
        assert {pair for pair in wanted if exists({one: pair[0], other: pair[1]})} <= met, (one, other)


@pytest.fixture
def needed(monkeypatch) -> set:
    """Fills with what makes a kernel another one, as `once` has it: its key, and the shapes of what it is given.

    No kernel is traced: each is taken for one that gives zeros. What is jitted would keep that, and is not here.
    """
    found = set()

    def once(kernel, key, *arguments):
        leaves, structure = jax.tree.flatten(arguments)
        found.add((key, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)))
        return jax.tree.leaves(kernel(*arguments))

    def zeros(body, *, out_type, **_):
        return lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_type)

    monkeypatch.setattr(plgpu, "kernel", zeros)
    for module in (attention, decoding, matmul):
        monkeypatch.setattr(module, "once", once)
    monkeypatch.setattr(decoding, "_launch", decoding._launch.__wrapped__)
    for implementations, jitted in (
        (IMPLEMENTATIONS, attention.flash_attention),
        (OF_PRODUCTS, matmul.streaming_matmul),
        (OF_ROWS, matmul.streaming_mlp),
    ):
        monkeypatch.setitem(implementations, "mosaic_gpu", jitted.__wrapped__)
    return found


def trace(run, kernel, launch: Launch) -> None:
    def program():
        inputs = Shapes(launch.case)
        return run(kernel, inputs, launch.dtype, launch.kv_dtype and inputs.quantized(launch.kv_dtype))

    jax.eval_shape(program)


def test_at_most_150_kernels(needed):
    for launch in LAUNCHES["prefill"]:
        trace(prefill.run, IMPLEMENTATIONS["mosaic_gpu"], launch)
    of_slots = (
        causal.SHARED,
        *tree.CAUSAL_BITS.values(),
        *(replace(case, tree=True) for case in tree.CAUSAL_BITS.values()),
    )
    for launch in (*LAUNCHES["decoding"], *(Launch(case, jnp.bfloat16) for case in of_slots)):
        trace(decoding_program.run, decoding_program.KERNEL, launch)
    tables = sum(map(len, LAUNCHES.values())) + len(of_slots)
    assert len(needed) == tables  # all are different
    for name, length in itertools.product(memory.OPS, memory.KERNEL_LENGTHS):
        jax.eval_shape(memory.kernel(name), *memory.kernel_arguments(name, length))
    for name in sanitized.KERNELS:
        jax.eval_shape(partial(sanitized.KERNELS[name], "mosaic_gpu"))
    for case in (products.INTERPRETED | products.PAIRED).values():
        jax.eval_shape(lambda case=case: OF_PRODUCTS["mosaic_gpu"](products.arguments(case), config=case.config))
    for case in of_products.ON_A_GPU.values():
        jax.eval_shape(lambda case=case: OF_PRODUCTS["mosaic_gpu"](products.arguments(case)))
    for tokens, sizes in of_rows.ON_A_GPU:
        jax.eval_shape(lambda given=(tokens, *sizes): OF_ROWS["mosaic_gpu"](of_rows.arguments(*given)))
    assert len(needed) <= 150

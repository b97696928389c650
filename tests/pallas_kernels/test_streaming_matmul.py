"""The weight-streaming matmul: interpreted on the CPU against float64, lowered at real shapes, and run on a GPU."""

import re
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.streaming_matmul import config as configs
from pallas_kernels.streaming_matmul import mosaic_gpu, streaming_matmul
from pallas_kernels.streaming_matmul.arguments import PRODUCTS, Arguments
from pallas_kernels.streaming_matmul.config import Config, Shape
from pallas_kernels.streaming_matmul.problems import LLAMA_3_8B, PROBLEMS, Problem
from tests.pallas_kernels.gpu_program import interpreted, lower

BF16, F16, F32 = (jnp.dtype(dtype) for dtype in (jnp.bfloat16, jnp.float16, jnp.float32))


@dataclass(frozen=True)
class Case:
    tokens: int
    w_axes: str
    config: Config
    extras: str = ""  # of norm, bias, residual
    hidden: int = 256
    outputs: int = 128
    dtype: jnp.dtype = BF16
    out_dtype: jnp.dtype = BF16


def arguments(case: Case, seed: int = 0) -> Arguments:
    """Random arguments; where a scale or a bias is float32 and where it is not alternates with the dtype."""
    keys = jax.random.split(jax.random.key(seed), 4)
    x, w = Problem(case.tokens, case.hidden, case.outputs, case.w_axes).inputs(keys[0], case.dtype)
    bias_shape = (2, case.outputs) if "c" in case.w_axes else (case.outputs,)
    scale = 1 + jax.random.normal(keys[1], (case.hidden,), F32) / 4
    return Arguments(
        x,
        w,
        scale if "norm" in case.extras else None,
        jax.random.normal(keys[2], bias_shape, case.dtype) if "bias" in case.extras else None,
        jax.random.normal(keys[3], (case.tokens, case.outputs), case.dtype) if "residual" in case.extras else None,
        case.w_axes,
        1e-5,
        case.out_dtype,
    )


def call(given: Arguments, implementation: str) -> jax.Array:
    return streaming_matmul(
        given.x_MD,
        given.w,
        w_axes=given.w_axes,
        norm_scale_D=given.norm_scale_D,
        norm_eps=given.norm_eps,
        bias=given.bias,
        residual_MN=given.residual_MN,
        out_dtype=given.out_dtype,
        implementation=implementation,
    )


def oracle(given: Arguments) -> tuple[np.ndarray, np.ndarray]:
    """The result in float64, and how far from it rounding may lead.

    What the tensor cores take of a normed x is rounded to u = 2^-8 or 2^-11 of it at most, half of that on the mean;
    D sums in float32 add D * 2^-24 of the magnitudes; the result is rounded once.
    """
    x, w = (np.asarray(array, np.float64) for array in (given.x_MD, given.w))
    unit = float(jnp.finfo(given.x_MD.dtype).eps) / 2 if given.norm_scale_D is not None else 0.0
    if given.norm_scale_D is not None:
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + given.norm_eps) * np.asarray(given.norm_scale_D, np.float64)
    y = np.einsum(PRODUCTS[given.w_axes], x, w, optimize=True)
    bound = (unit + x.shape[1] * 2.0**-24) * np.einsum(PRODUCTS[given.w_axes], abs(x), abs(w), optimize=True)
    if given.bias is not None:
        y = y + np.asarray(given.bias, np.float64)
    if given.gated:
        gate, up = y[:, 0], y[:, 1]
        silu = gate / (1 + np.exp(-gate))
        bound = (
            1.1 * bound[:, 0] * abs(up) + abs(silu) * bound[:, 1] + 1.1 * bound[:, 0] * bound[:, 1]
        )  # |silu'| < 1.1
        y = silu * up
    if given.residual_MN is not None:
        y = y + np.asarray(given.residual_MN, np.float64)
    return y, bound + (abs(y) + bound) * max(float(jnp.finfo(given.out_dtype).eps) / 2, 2.0**-20)


def assert_close(found: jax.Array, given: Arguments) -> None:
    exact, bound = oracle(given)
    assert found.dtype == given.out_dtype
    excess = abs(np.asarray(found, np.float64) - exact) - bound
    assert excess.max() <= 0, f"{excess.max()} beyond the bound at {np.unravel_index(excess.argmax(), excess.shape)}"


SMALL = Config(tile_n=128, tile_d=64, stages=2)
# The interpreter knows no shared memory of another block: there the partial sums meet in device memory.
PARTS = Config(tile_n=128, tile_d=64, stages=2, split=2, exchange="gmem")

INTERPRETED = {
    "one token": Case(1, "DN", SMALL, "norm"),
    "more tiles than stages, a ragged tile": Case(3, "DN", replace(SMALL, tile_n=64), "bias residual", 320, 192),
    "output head": Case(3, "ND", replace(SMALL, tile_d=128, stages=1), "norm", out_dtype=F32),
    "gated": Case(8, "DcN", SMALL, "norm bias"),
    "gated and residual": Case(1, "DcN", replace(SMALL, stages=4), "residual", outputs=192),
    "parts": Case(3, "DN", PARTS, "residual"),
    "parts of a normed head, past the end of D": Case(8, "ND", PARTS, "norm bias", 320),
    "parts, tokens of several owners": Case(20, "DcN", PARTS, "norm residual", outputs=64),
    "three parts, two owners": Case(64, "DN", replace(PARTS, split=3, stages=1), "norm bias residual", 192, 64),
    "float16": Case(64, "ND", replace(SMALL, tile_n=64), "bias residual", 128, dtype=F16, out_dtype=F16),
}


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_equals_float64(name):
    case = INTERPRETED[name]
    given = arguments(case)
    with interpreted():
        found = jax.block_until_ready(mosaic_gpu.streaming_matmul(given, config=case.config))
    assert_close(found, given)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", ["gated", "parts of a normed head, past the end of D", "three parts, two owners"])
def test_other_implementations_equal_float64(name, implementation):
    given = arguments(replace(INTERPRETED[name], dtype=F32, out_dtype=F32))
    assert_close(call(given, implementation), given)


def shapes_of(problem: Problem, extras: str, out_dtype: jnp.dtype = BF16) -> Arguments:
    case = Case(problem.tokens, problem.w_axes, SMALL, extras, problem.hidden, problem.outputs, out_dtype=out_dtype)
    return jax.eval_shape(lambda: arguments(case))


# What a step of the model asks of each weight.
IN_THE_MODEL = {"qkv": "norm bias", "o": "residual", "up": "norm", "down": "residual", "head": "norm"}


@pytest.mark.parametrize(("tokens", "early_weights"), [(1, True), (2, False), (16, False), (64, True)])
@pytest.mark.parametrize("name", LLAMA_3_8B)
def test_real_shapes_lower(name, tokens, early_weights):
    given = shapes_of(PROBLEMS[f"llama-3-8b {name} M={tokens}"], IN_THE_MODEL[name], F32 if name == "head" else BF16)
    config = replace(configs.config_for(Shape.of(given)), early_weights=early_weights)
    text = lower(lambda given: mosaic_gpu.streaming_matmul(given, config=config), given)
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize("name", LLAMA_3_8B)
def test_configs_fit(name, tokens):
    """Every candidate is valid, as is the one that a shape gets, and that is not far from filling the card."""
    shape = Shape.of(shapes_of(PROBLEMS[f"llama-3-8b {name} M={tokens}"], IN_THE_MODEL[name]))
    found = configs.candidates(shape)
    assert len(found) >= 4
    chosen = configs.config_for(shape)
    for config in [*found, chosen]:
        config.check(shape)
    assert chosen.blocks(shape) >= 0.9 * configs.SMS
    assert chosen.stages >= 2


@pytest.mark.parametrize("case", [Case(1, "DN", SMALL), *list(INTERPRETED.values())[::2]])
def test_shared_memory_is_what_the_launch_takes(case, monkeypatch):
    """The compiler tells what it would take when that is too much."""
    given = jax.eval_shape(lambda: arguments(replace(case, hidden=32768)))
    config = replace(case.config, stages=32, exchange="smem")
    monkeypatch.setattr(configs, "SMEM_OF_BLOCK", 1 << 30)
    with pytest.raises(ValueError, match="exceeds available shared memory") as error:
        lower(lambda given: mosaic_gpu.streaming_matmul(given, config=config), given)
    (taken,) = re.findall(r"\bsmem_bytes=(\d+)", str(error.value))
    counted = configs.smem_bytes(config, Shape.of(given))
    assert counted - configs.SMEM_OVERHEAD <= int(taken) <= counted


def test_no_weight_sized_array_beside_the_weight():
    """Both orders of the weight's axes go to the kernel as they are."""
    for name in ("down", "head"):
        text = lower(call, shapes_of(PROBLEMS[f"llama-3-8b {name} M=16"], "norm"), implementation="mosaic_gpu")
        assert "stablehlo.transpose" not in text


def floats(*shape: int, dtype: jnp.dtype = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


WRONG = {
    "order of the axes": ({"w_axes": "NcD"}, "w_axes is 'NcD'; allowed: DN, ND, DcN"),
    "rank of x": ({"x_MD": floats(3, 4, 64)}, "x.shape .*the axes MD"),
    "rank of w": ({"w": floats(64, 2, 64)}, "w.shape .*the axes DN"),
    "no tokens": ({"x_MD": floats(0, 64)}, "x.shape .*at least 1"),
    "D": ({"x_MD": floats(3, 128)}, "x.shape .*D = 64"),
    "D of the other order": ({"w": floats(128, 64), "x_MD": floats(3, 128), "w_axes": "ND"}, "x.shape .*D = 64"),
    "halves": ({"w": floats(64, 3, 64), "w_axes": "DcN"}, "w.shape .*c = 2"),
    "dtype of x": ({"x_MD": floats(3, 64, dtype=jnp.dtype(jnp.int8))}, "x.dtype is int8"),
    "dtype of w": ({"w": floats(64, 128, dtype=F16)}, "w.dtype is float16; allowed: bfloat16"),
    "scale": ({"norm_scale_D": floats(128)}, r"norm_scale.shape .*\(64,\)"),
    "eps": ({"norm_eps": -1.0}, "norm_eps is -1.0"),
    "bias": ({"bias": floats(2, 128)}, r"bias.shape .*\(128,\)"),
    "bias of two halves": ({"w": floats(64, 2, 64), "w_axes": "DcN", "bias": floats(64)}, r"bias.shape .*\(2, 64\)"),
    "dtype of the bias": ({"bias": floats(128, dtype=jnp.dtype(jnp.int32))}, "bias.dtype is int32"),
    "residual": ({"residual_MN": floats(128, 3)}, r"residual.shape .*\(3, 128\)"),
    "dtype of the result": ({"out_dtype": jnp.dtype(jnp.int32)}, "out.dtype is int32"),
    "implementation": ({"implementation": "cuda"}, "implementation='cuda' of streaming_matmul does not exist"),
}
BEYOND_THE_KERNEL = {
    "float32": ({"x_MD": floats(3, 64, dtype=F32), "w": floats(64, 128, dtype=F32)}, "x is float32"),
    "tokens": ({"x_MD": floats(65, 64)}, "x has 65 tokens; at most 64"),
    "D": ({"x_MD": floats(3, 72), "w": floats(72, 128)}, "D is 72"),
    "N": ({"w": floats(64, 100)}, "N is 100"),
    "normed float16": (
        {"x_MD": floats(3, 64, dtype=F16), "w": floats(64, 128, dtype=F16), "norm_scale_D": floats(64)},
        "x is float16 and normed",
    ),
}


def evaluate(change: dict) -> jax.ShapeDtypeStruct:
    given = {"x_MD": floats(3, 64), "w": floats(64, 128)} | change
    arrays = {name: value for name, value in given.items() if isinstance(value, jax.ShapeDtypeStruct)}
    static = {name: value for name, value in given.items() if name not in arrays}
    return jax.eval_shape(lambda arrays: streaming_matmul(**arrays, **static), arrays)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name):
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        evaluate(change)


@pytest.mark.parametrize("name", BEYOND_THE_KERNEL)
def test_the_kernel_says_what_it_does_not_take(name):
    change, message = BEYOND_THE_KERNEL[name]
    with pytest.raises(ValueError, match=message):
        evaluate(change | {"implementation": "mosaic_gpu"})
    assert evaluate(change).dtype == change.get("x_MD", floats(1)).dtype  # auto: XLA


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_n": 96}, "tile_n is 96"),
        ({"tile_d": 32}, "tile_d is 32"),
        ({"stages": 0}, "stages is 0"),
        ({"split": 9}, "split is 9"),
        ({"exchange": "l2"}, "exchange is 'l2'"),
    ],
)
def test_a_config_is_valid(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("w_axes", "change", "message"),
    [
        ("DcN", {"tile_n": 64}, "tile_n is 64; allowed: a multiple of 128"),
        ("DN", {"stages": 5}, "stages is 5; allowed: at most the 4 tiles"),
        ("DN", {"tile_n": 256, "tile_d": 256, "stages": 2}, "shared memory of the config"),
    ],
)
def test_a_config_fits_its_shape(w_axes, change, message):
    given = jax.eval_shape(lambda: arguments(Case(1, w_axes, SMALL, hidden=512 if "tile_d" in change else 256)))
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change).check(Shape.of(given))


def root_mean_square(error: np.ndarray) -> float:
    return float(np.sqrt((error**2).mean()))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "early_weights"), [(1, False), (3, True), (8, True), (12, False), (16, True), (64, True)]
)
@pytest.mark.parametrize("name", LLAMA_3_8B)
def test_on_a_gpu_as_exact_as_xla_and_the_same_every_time(name, tokens, early_weights):
    D, N, w_axes = LLAMA_3_8B[name]
    out_dtype = F32 if name == "head" else BF16
    given = arguments(Case(tokens, w_axes, SMALL, IN_THE_MODEL[name], D, min(N, 16384), out_dtype=out_dtype))
    config = replace(configs.config_for(Shape.of(given)), early_weights=early_weights)
    run = jax.jit(lambda given: [mosaic_gpu.streaming_matmul(given, config=config) for _ in range(3)])
    first, second, third = (np.asarray(y, np.float64) for y in run(given))
    exact, _ = oracle(given)
    by_xla = np.asarray(call(given, "xla"), np.float64)
    assert root_mean_square(first - exact) <= 1.1 * root_mean_square(by_xla - exact)
    np.testing.assert_array_equal(second, first)
    np.testing.assert_array_equal(third, first)


@pytest.mark.gpu
def test_on_a_gpu_early_weights_change_nothing():
    """Every call reads what the one before it wrote."""
    given = [arguments(Case(16, "DN", SMALL, "norm", 4096, 4096), seed) for seed in range(4)]
    config = configs.config_for(Shape.of(given[0]))

    @partial(jax.jit, static_argnames="early_weights")
    def chain(given: list[Arguments], early_weights: bool) -> jax.Array:
        x_MD = given[0].x_MD
        for i in range(40):
            step = replace(given[i % 4], x_MD=x_MD)
            x_MD = mosaic_gpu.streaming_matmul(step, config=replace(config, early_weights=early_weights))
        return x_MD

    late, early = (np.asarray(chain(given, early_weights), np.float32) for early_weights in (False, True))
    assert np.isfinite(late).all()
    np.testing.assert_array_equal(early, late)


@pytest.mark.gpu
@pytest.mark.parametrize("name", INTERPRETED)
def test_on_a_gpu_equals_float64(name):
    case = INTERPRETED[name]
    given = arguments(case)
    for exchange in ("smem", "gmem"):
        assert_close(mosaic_gpu.streaming_matmul(given, config=replace(case.config, exchange=exchange)), given)

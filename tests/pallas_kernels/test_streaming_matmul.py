"""The weight-streaming matmul: interpreted on the CPU against float64, lowered at real shapes, and run on a GPU."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.streaming_matmul import config as configs
from pallas_kernels.streaming_matmul import mosaic_gpu, streaming_matmul, takes
from pallas_kernels.streaming_matmul.arguments import Arguments
from pallas_kernels.streaming_matmul.config import Shape
from pallas_kernels.streaming_matmul.problems import LLAMA_3_8B, PROBLEMS, Problem
from tests.pallas_kernels.draws import on_the_host
from tests.pallas_kernels.gpu_program import interpreted, lower
from tests.pallas_kernels.matmul_cases import (
    BF16,
    EXPERTS,
    F16,
    F32,
    INTERPRETED,
    PAIRED,
    SMALL,
    Case,
    arguments,
    assert_close,
    call,
    evaluate,
    floats,
    oracle,
    root_mean_square,
)

INT32 = jnp.dtype(jnp.int32)


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_equals_float64(name):
    case = INTERPRETED[name]
    given = arguments(case, on_the_host())
    with interpreted():
        found = jax.block_until_ready(mosaic_gpu.streaming_matmul(given, config=case.config))
    assert_close(found, given)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", ["gated, in rounds", "groups of two experts", "three parts, two owners"])
def test_other_implementations_equal_float64(name, implementation):
    given = arguments(replace(INTERPRETED[name], dtype=F32, out_dtype=F32), on_the_host())
    assert_close(call(given, implementation), given)


def shapes_of(problem: Problem, extras: str, out_dtype: jnp.dtype = BF16) -> Arguments:
    case = Case(problem.tokens, problem.w_axes, SMALL, extras, problem.hidden, problem.outputs, out_dtype=out_dtype)
    return jax.eval_shape(lambda: arguments(case))


# What a step of the model asks of each weight.
IN_THE_MODEL = {"qkv": "norm bias", "o": "residual", "up": "norm", "down": "residual", "head": "norm"}


@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize("name", LLAMA_3_8B)
def test_real_shapes_lower_without_a_copy_of_the_weight(name, tokens):
    given = shapes_of(PROBLEMS[f"llama-3-8b {name} M={tokens}"], IN_THE_MODEL[name], F32 if name == "head" else BF16)
    text = lower(call, given, implementation="mosaic_gpu")
    assert "mosaic_gpu" in text
    assert "stablehlo.transpose" not in text  # the weight goes to the kernel as it is, in either order of its axes


@pytest.mark.parametrize(("hidden", "outputs", "w_axes"), [(4096, 14336, "EDcN"), (14336, 4096, "EDN")])
def test_experts_lower_without_a_copy_of_their_weights(hidden, outputs, w_axes):
    case = Case(1, w_axes, SMALL, "bias", hidden, outputs, experts_of_groups=(2, 0))
    text = lower(call, jax.eval_shape(lambda: arguments(case)), implementation="mosaic_gpu")
    assert not re.search("stablehlo.(gather|dynamic_slice|transpose)", text)


@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize("name", LLAMA_3_8B)
def test_configs_fit(name, tokens):
    """Every candidate is valid, as is the one that a shape gets; the heuristic's fill the card, with equal work."""
    shape = Shape.of(shapes_of(PROBLEMS[f"llama-3-8b {name} M={tokens}"], IN_THE_MODEL[name]))
    found = configs.candidates(shape)
    assert len(found) >= 4
    chosen = configs.heuristic(shape)
    for config in [*found, chosen, configs.config_for(shape)]:
        config.check(shape)
    assert configs.FEWEST_BLOCKS <= chosen.blocks(shape) <= configs.MULTIPROCESSORS
    assert chosen.busy(shape) >= configs.LEAST_BUSY


@pytest.mark.parametrize(
    ("name", "tokens", "kernel"),
    [("o", 1, True), ("o", 2, False), ("o", 16, False), ("o", 17, True), ("qkv", 16, True), ("down", 65, False),
     ("head", 1, False), ("head", 64, False)],
)  # fmt: skip
def test_the_kernel_is_chosen_where_it_was_faster(name, tokens, kernel, monkeypatch):
    D, N, w_axes = LLAMA_3_8B[name]
    x, w = floats(tokens, D), floats(*Problem(tokens, D, N, w_axes).w_shape)
    assert not takes(x, w, w_axes=w_axes)  # not without a GPU
    monkeypatch.setattr(dispatch, "compute_capability", lambda: dispatch.HOPPER)
    assert takes(x, w, w_axes=w_axes) == kernel


@pytest.mark.parametrize(
    ("name", "tokens", "cut"),
    [("qkv", 64, (64, 128, 1)), ("o", 32, (64, 128, 1)), ("down", 64, (64, 128, 2))],
)
def test_a_measured_shape_gets_its_cut(name, tokens, cut):
    given = shapes_of(PROBLEMS[f"llama-3-8b {name} M={tokens}"], IN_THE_MODEL[name])
    config = configs.config_for(Shape.of(given))
    assert (config.tile_n, config.tile_d, config.split) == cut
    assert config != configs.heuristic(Shape.of(given))
    assert config.stages > 2


@pytest.mark.parametrize("case", [Case(1, "DN", SMALL), *list(INTERPRETED.values())[::2]])
def test_shared_memory_is_what_the_launch_takes(case, monkeypatch):
    """The compiler tells what it would take when that is too much."""
    given = jax.eval_shape(lambda: arguments(replace(case, hidden=32768)))
    config = replace(case.config, stages=32, exchange="smem")
    monkeypatch.setattr(configs, "SHARED_BYTES", 1 << 30)
    with pytest.raises(ValueError, match="exceeds available shared memory") as error:
        lower(lambda given: mosaic_gpu.streaming_matmul(given, config=config), given)
    (taken,) = re.findall(r"\bsmem_bytes=(\d+)", str(error.value))
    counted = configs.smem_bytes((config, Shape.of(given)))
    assert counted - configs.SMEM_OVERHEAD <= int(taken) <= counted


OF_EXPERTS = {"w": floats(EXPERTS, 128, 64), "w_axes": "EDN", "x": floats(2, 3, 128)}
GATED = {"w": floats(128, 2, 64), "w_axes": "DcN"}
WRONG = {
    "order of the axes": ({"w_axes": "NcD"}, "w_axes is 'NcD'; allowed: DN, ND, DcN"),
    "rank of x": ({"x": floats(3, 4, 128)}, "x.shape .*the axes MD"),
    "experts without groups": (OF_EXPERTS | {"x": floats(3, 128)}, "x.shape .*the axes AMD"),
    "no expert": (OF_EXPERTS, "expert is None; allowed: an array for a weight EDN"),
    "expert of nothing": ({"expert_A": floats(2, dtype=INT32)}, "expert is an array; allowed: None for a weight DN"),
    "groups": (OF_EXPERTS | {"expert_A": floats(3, dtype=INT32)}, r"expert.shape .*\(2,\)"),
    "dtype of the experts": (OF_EXPERTS | {"expert_A": floats(2)}, "expert.dtype is bfloat16"),
    "residual of experts": (
        OF_EXPERTS | {"expert_A": floats(2, dtype=INT32), "residual_MN": floats(3, 64)},
        "residual is an array; allowed: None",
    ),
    "rank of w": ({"w": floats(128, 2, 64)}, "w.shape .*the axes DN"),
    "no tokens": ({"x": floats(0, 128)}, "x.shape .*at least 1"),
    "D": ({"x": floats(3, 256)}, "x.shape .*D = 128"),
    "D of the other order": ({"w": floats(256, 64), "x": floats(3, 256), "w_axes": "ND"}, "x.shape .*D = 64"),
    "halves": ({"w": floats(128, 3, 64), "w_axes": "DcN"}, "w.shape .*c = 2"),
    "dtype of x": ({"x": floats(3, 128, dtype=jnp.dtype(jnp.int8))}, "x.dtype is int8"),
    "dtype of w": ({"w": floats(128, 128, dtype=F16)}, "w.dtype is float16; allowed: bfloat16"),
    "scale": ({"norm_scale_D": floats(64)}, r"norm_scale.shape .*\(128,\)"),
    "eps": ({"norm_eps": -1.0}, "norm_eps is -1.0"),
    "no eps": ({"norm_eps": None}, "norm_eps is None; allowed: a finite number"),
    "bias": ({"bias": floats(2, 128)}, r"bias.shape .*\(128,\)"),
    "bias of two halves": (GATED | {"bias": floats(64)}, r"bias.shape .*\(2, 64\)"),
    "dtype of the bias": ({"bias": floats(128, dtype=INT32)}, "bias.dtype is int32"),
    "residual": ({"residual_MN": floats(128, 3)}, r"residual.shape .*\(3, 128\)"),
    "dtype of the result": ({"out_dtype": INT32}, "out_dtype is int32"),
    "no dtype": ({"out_dtype": "float33"}, "out_dtype is 'float33'; allowed: float32"),
    "no x": ({"x": None}, "x is a NoneType; allowed: an array"),
    "bias in a list": ({"bias": [1.0]}, "bias is a list; allowed: an array"),
    "implementation": ({"implementation": "cuda"}, "implementation='cuda' of streaming_matmul does not exist"),
}
BEYOND_THE_KERNEL = {
    "float32": ({"x": floats(3, 128, dtype=F32), "w": floats(128, 128, dtype=F32)}, "x.dtype is float32"),
    "tokens": ({"x": floats(65, 128)}, r"x.shape is \(65, 128\); allowed: at most 64 tokens"),
    "D": ({"x": floats(3, 136), "w": floats(136, 128)}, r"w.shape is \(136, 128\); allowed: D a multiple of 64"),
    "small D": ({"x": floats(3, 64), "w": floats(64, 128)}, r"w.shape is \(64, 128\); allowed: D .*, from 128"),
    "N": ({"w": floats(128, 100)}, r"w.shape is \(128, 100\); allowed: N a multiple of 64"),
    "a norm's scale of 240 KB": (
        {"x": floats(3, 61440), "w": floats(61440, 128), "norm_scale_D": floats(61440, dtype=F32)},
        r"w.shape is \(61440, 128\); allowed: a D that leaves shared memory",
    ),
    "normed float16": (
        {"x": floats(3, 128, dtype=F16), "w": floats(128, 128, dtype=F16), "norm_scale_D": floats(128)},
        "norm_scale is an array; allowed: None where x is float16",
    ),
}


GIVEN = {"x": floats(3, 128), "w": floats(128, 128)}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name):
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        evaluate(streaming_matmul, GIVEN | change)


@pytest.mark.parametrize("name", BEYOND_THE_KERNEL)
def test_the_kernel_says_what_it_does_not_take(name):
    change, message = BEYOND_THE_KERNEL[name]
    with pytest.raises(ValueError, match=message):
        evaluate(streaming_matmul, GIVEN | change | {"implementation": "mosaic_gpu"})
    assert evaluate(streaming_matmul, GIVEN | change).dtype == change.get("x", floats(1)).dtype  # auto: XLA


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_n": 96}, "tile_n is 96"),
        ({"tile_d": 32}, "tile_d is 32"),
        ({"stages": 1}, "stages is 1; allowed: at least 2"),
        ({"rounds": 0}, "rounds is 0"),
        ({"rounds": 2, "split": 2}, "rounds is 2; allowed: 1 where blocks share columns"),
        ({"split": 9}, "split is 9"),
        ({"exchange": "l2"}, "exchange is 'l2'"),
        ({"pieces": 0}, "pieces is 0; allowed: divisors of tile_d / 64 = 1"),
        ({"pieces": 2}, "pieces is 2; allowed: divisors of tile_d / 64 = 1"),
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


@pytest.mark.parametrize("name", PAIRED)
def test_what_runs_on_a_gpu_alone_lowers(name):
    case = PAIRED[name]
    given = jax.eval_shape(lambda: arguments(case))
    assert "mosaic_gpu" in lower(lambda given: mosaic_gpu.streaming_matmul(given, config=case.config), given)


def of_the_model(name: str, tokens: int) -> Case:
    """A weight of Llama-3-8B; the kernel chooses its config itself."""
    D, N, w_axes = LLAMA_3_8B[name]
    out_dtype = F32 if name == "head" else BF16
    return Case(tokens, w_axes, SMALL, IN_THE_MODEL[name], D, min(N, 32768), out_dtype=out_dtype)


ON_A_GPU = {f"{name}, {tokens}": of_the_model(name, tokens) for name in LLAMA_3_8B for tokens in (1, 3, 12, 16, 64)}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
def test_on_a_gpu_as_exact_as_xla_and_the_same_every_time(name):
    given = arguments(ON_A_GPU[name])
    first, second, third = (np.asarray(mosaic_gpu.streaming_matmul(given), np.float64) for _ in range(3))
    exact, _ = oracle(given)
    by_xla = np.asarray(call(given, "xla"), np.float64)
    assert root_mean_square(first - exact) <= 1.1 * root_mean_square(by_xla - exact)
    np.testing.assert_array_equal(second, first)
    np.testing.assert_array_equal(third, first)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*INTERPRETED, *PAIRED])
def test_on_a_gpu_equals_float64(name):
    case = (INTERPRETED | PAIRED)[name]
    given = arguments(case)
    assert_close(mosaic_gpu.streaming_matmul(given, config=case.config), given)

"""The matmul of many tokens: interpreted on the CPU against float64, lowered at real shapes, and run on a GPU."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given as sampled
from hypothesis import settings
from hypothesis import strategies as st

from pallas_kernels import dispatch
from pallas_kernels.dispatch import MULTIPROCESSORS
from pallas_kernels.hopper import SHARED_BYTES
from pallas_kernels.streaming_matmul.arguments import Arguments
from pallas_kernels.tiled_matmul import mosaic_gpu, takes_many, tiled_matmul
from pallas_kernels.tiled_matmul.config import TILE_ROWS, Config, Shape, config_for
from pallas_kernels.tiled_matmul.mosaic_gpu import Problem
from pallas_kernels.tiled_matmul.problems import PROBLEMS
from tests.pallas_kernels.draws import Normal, on_the_device, on_the_host
from tests.pallas_kernels.gpu_program import interpreted, lower
from tests.pallas_kernels.matmul_cases import BF16, F16, F32, assert_close, evaluate, floats, oracle, root_mean_square


@dataclass(frozen=True)
class Case:
    tokens: int
    hidden: int
    outputs: int
    w_axes: str = "DN"
    residual: bool = False
    dtype: jnp.dtype = BF16
    config: Config | None = None
    blocks: int | None = None


def arguments(case: Case, normal: Normal | None = None) -> Arguments:
    normal, D, N, dtype = normal or on_the_device(), case.hidden, case.outputs, case.dtype
    w = normal((D, 2, N) if case.w_axes == "DcN" else (D, N), dtype, D**-0.5)
    residual = normal((case.tokens, N), dtype) if case.residual else None
    return Arguments(normal((case.tokens, D), dtype), w, None, None, None, residual, case.w_axes, 0.0, dtype)


def call(given: Arguments, implementation: str) -> jax.Array:
    return tiled_matmul(
        given.x, given.w, w_axes=given.w_axes, residual_MN=given.residual_MN, implementation=implementation
    )


INTERPRETED = {
    "gated, in rounds, a ragged tile of tokens": Case(
        200, 256, 256, "DcN", config=Config(256, stages=2), blocks=2
    ),
    "residual in four pieces": Case(100, 192, 256, residual=True, config=Config(256, stages=3), blocks=1),
    "gated with a residual, one piece a tile": Case(
        130, 128, 128, "DcN", True, config=Config(128, stages=2), blocks=1
    ),
    "float16, tokens that are no eights, bands": Case(
        300, 128, 256, dtype=F16, config=Config(128, stages=2, band=2), blocks=1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_equals_float64(name):
    case = INTERPRETED[name]
    given = arguments(case, on_the_host())
    with interpreted():
        run = mosaic_gpu.tiled_matmul(given, config=case.config, blocks=case.blocks)
        found = jax.block_until_ready(run)
    assert_close(found, given)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_other_implementations_equal_float64(implementation):
    given = arguments(Case(70, 128, 64, "DcN", True, dtype=F32), on_the_host())
    assert_close(call(given, implementation), given)


def shapes_of(name: str) -> Arguments:
    problem = PROBLEMS[name]
    case = Case(problem.tokens, problem.hidden, problem.outputs, problem.w_axes, problem.residual)
    return jax.eval_shape(lambda: arguments(case))


@pytest.mark.parametrize("name", ["llama-3-8b up M=2048", "llama-3-8b up M=512", "llama-3-8b down M=2048"])
def test_real_shapes_lower_without_a_copy_of_the_weight(name):
    """Of clusters of two, of narrow tiles, and with a residual."""
    text = lower(call, shapes_of(name), implementation="mosaic_gpu")
    assert "mosaic_gpu" in text
    assert "stablehlo.transpose" not in text
    assert "stablehlo.pad" not in text


@pytest.mark.parametrize("name", PROBLEMS)
def test_configs_fit(name):
    shape = Shape.of(shapes_of(name))
    config = config_for(shape)
    config.check(shape)
    assert config.smem_bytes(shape) <= SHARED_BYTES
    assert 0 < config.busy(shape, MULTIPROCESSORS) <= 1


@settings(max_examples=25)
@sampled(st.data())
def test_blocks_write_every_tile_once(data):
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 12))
    cluster, band = data.draw(st.sampled_from((1, 2))), data.draw(st.integers(1, 9))
    shape = Shape(rows * TILE_ROWS, 64, columns * 256, False, False, BF16)
    problem = Problem(shape, Config(256, cluster=cluster, band=band), data.draw(st.integers(cluster, 20)))
    tiles, count = jnp.arange(40 * 12, dtype=jnp.int32), problem.config.tiles(shape)
    found = []
    for part in range(cluster):  # of as many tiles in every example, for which nothing compiles anew
        row, column = problem.place(tiles, jnp.int32(part))
        found += zip(row[:count].tolist(), column[:count].tolist(), strict=True)
    last = -(-rows // cluster) * cluster  # where the tiles of tokens do not divide among clusters, one has none
    assert sorted(found) == [(row * TILE_ROWS, column * 256) for row in range(last) for column in range(columns)]


def test_the_kernel_has_a_derivative():
    case = INTERPRETED["gated with a residual, one piece a tile"]
    given = arguments(case, on_the_host())
    weights = jax.random.normal(jax.random.key(7), (case.tokens, case.outputs), F32)

    def gradients(run) -> list[jax.Array]:
        return jax.tree.leaves(jax.jit(jax.grad(lambda given: jnp.sum(run(given).astype(F32) * weights)))(given))

    with interpreted():
        found = gradients(lambda given: mosaic_gpu.tiled_matmul(given, config=case.config, blocks=case.blocks))
    for x, exact in zip(found, gradients(lambda given: call(given, "reference")), strict=True):
        x, exact = (np.asarray(array, np.float64) for array in (x, exact))
        assert np.linalg.norm(x - exact) <= 2.0**-7 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("name", "tokens", "kernel"),
    [("up", 128, True), ("up", 144, False), ("up", 256, True), ("up", 512, True), ("up", 2048, True),
     ("qkv", 512, False), ("qkv", 2048, True), ("o", 256, False), ("o", 512, True), ("down", 8192, True)],
)  # fmt: skip
def test_the_kernel_is_chosen_where_it_was_faster(name, tokens, kernel, monkeypatch):
    problem = replace(PROBLEMS[f"llama-3-8b {name} M=2048"], tokens=tokens)
    given = jax.eval_shape(lambda: problem.arguments(jax.random.key(0), BF16))
    assert not takes_many(**given, w_axes=problem.w_axes)  # not without a GPU
    monkeypatch.setattr(dispatch, "compute_capability", lambda: dispatch.HOPPER)
    assert takes_many(**given, w_axes=problem.w_axes) == kernel


WRONG = {
    "order of the axes": ({"w_axes": "ND"}, "w_axes is 'ND'; allowed: DN, DcN"),
    "D": ({"x_MD": floats(128, 256)}, "x.shape .*D = 128"),
    "halves": ({"w": floats(128, 3, 64), "w_axes": "DcN"}, "w.shape .*c = 2"),
    "dtype of w": ({"w": floats(128, 128, dtype=F16)}, "w.dtype is float16; allowed: bfloat16"),
    "residual": ({"residual_MN": floats(128, 3)}, r"residual.shape .*\(128, 128\)"),
    "implementation": ({"implementation": "cuda"}, "implementation='cuda' of tiled_matmul does not exist"),
}
BEYOND_THE_KERNEL = {
    "float32": ({"x_MD": floats(128, 128, dtype=F32), "w": floats(128, 128, dtype=F32)}, "x.dtype is float32"),
    "D": ({"x_MD": floats(128, 96), "w": floats(96, 128)}, r"w.shape is \(96, 128\); allowed: D a multiple of 64"),
    "N": ({"w": floats(128, 192)}, r"w.shape is \(128, 192\); allowed: N a multiple of 128"),
    "N of a gated weight": (
        {"w": floats(128, 2, 96), "w_axes": "DcN"}, r"w.shape is \(128, 2, 96\); allowed: N a multiple of 64",
    ),
    "residual": ({"residual_MN": floats(128, 128, dtype=F32)}, "residual.dtype is float32; allowed: bfloat16, as x"),
}  # fmt: skip


GIVEN = {"x_MD": floats(128, 128), "w": floats(128, 128)}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name):
    change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        evaluate(tiled_matmul, GIVEN | change)


@pytest.mark.parametrize("name", BEYOND_THE_KERNEL)
def test_the_kernel_says_what_it_does_not_take(name):
    change, message = BEYOND_THE_KERNEL[name]
    with pytest.raises(ValueError, match=message):
        evaluate(tiled_matmul, GIVEN | change | {"implementation": "mosaic_gpu"})
    evaluate(tiled_matmul, GIVEN | change)  # `auto` has XLA for it


@pytest.mark.parametrize("config", [{"columns": 192}, {"columns": 256, "stages": 1}, {"columns": 256, "cluster": 3}])
def test_a_config_is_checked(config):
    with pytest.raises(ValueError, match="allowed"):
        Config(**config)


def test_a_config_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="shared memory"):
        Config(256, stages=5).check(Shape(128, 128, 256, False, False, BF16))
    with pytest.raises(ValueError, match="columns"):
        Config(256).check(Shape(128, 128, 128, False, False, BF16))


ON_A_GPU = {
    **{
        name: Case(p.tokens, p.hidden, p.outputs, p.w_axes, p.residual)
        for name, p in PROBLEMS.items()
        if p.tokens < 4096
    },
    "gated, 300 tokens": Case(300, 4096, 1792, "DcN"),
    "72 tokens, one step": Case(72, 64, 512, residual=True),
    "an odd number of tiles of tokens, float16": Case(600, 2048, 6144, dtype=F16),
    "gated with a residual, float16": Case(256, 4096, 14336, "DcN", True, dtype=F16),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
def test_on_a_gpu_as_exact_as_xla_and_the_same_every_time(name):
    given = arguments(ON_A_GPU[name])
    first, second = (np.asarray(mosaic_gpu.tiled_matmul(given), np.float64) for _ in range(2))
    exact, _ = oracle(given)
    by_xla = np.asarray(call(given, "xla"), np.float64)
    assert root_mean_square(first - exact) <= 1.1 * root_mean_square(by_xla - exact)
    np.testing.assert_array_equal(second, first)


@pytest.mark.gpu
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("name", INTERPRETED)
def test_on_a_gpu_equals_float64(name, cluster):
    case = INTERPRETED[name]
    assert case.config is not None
    given = arguments(case)
    config = replace(case.config, cluster=cluster)
    assert_close(mosaic_gpu.tiled_matmul(given, config=config, blocks=2), given)

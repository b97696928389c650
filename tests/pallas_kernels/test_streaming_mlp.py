"""The row of products that a layer ends with, as one launch: interpreted, lowered at real shapes, and run on a GPU."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.streaming_matmul import config as configs
from pallas_kernels.streaming_matmul import mosaic_gpu, streaming_mlp, takes_mlp
from pallas_kernels.streaming_matmul.config import MLPConfig, Shape
from pallas_kernels.streaming_matmul.mlp import MLPArguments, products
from tests.pallas_kernels.draws import Normal, on_the_device, on_the_host
from tests.pallas_kernels.gpu_program import interpreted, lower

LLAMA_3_8B = (4096, 14336, 4096)


def arguments(
    tokens: int, D: int, F: int, E: int | None, dtype=jnp.bfloat16, normal: Normal | None = None
) -> MLPArguments:
    normal = normal or on_the_device(tokens)
    x, up, down = normal((tokens, D), dtype), normal((D, 2, F), dtype, D**-0.5), normal((F, D), dtype, F**-0.5)
    scale = normal((D,), dtype, 1 / 4, 1.0)
    attended, o = (None, None) if E is None else (normal((tokens, E), dtype), normal((E, D), dtype, E**-0.5))
    return MLPArguments(x, up, down, scale, attended, o, 1e-5)


def call(given: MLPArguments, implementation: str) -> jax.Array:
    return streaming_mlp(
        given.x_MD,
        given.up_DcF,
        given.down_FD,
        norm_scale_D=given.norm_scale_D,
        norm_eps=given.norm_eps,
        attended_ME=given.attended_ME,
        o_ED=given.o_ED,
        implementation=implementation,
    )


def exact(given: MLPArguments, rounded: bool) -> np.ndarray:
    """In float64; `rounded` once after every product, and the normed x, to the dtype of x, as every implementation
    that passes them on in that dtype must."""

    def kept(x: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.asarray(x).astype(given.x_MD.dtype), np.float64) if rounded else x

    x, up, down, scale, attended, o = (
        None if array is None else np.asarray(array, np.float64)
        for array in (given.x_MD, given.up_DcF, given.down_FD, given.norm_scale_D, given.attended_ME, given.o_ED)
    )
    h = x if o is None else kept(x + attended @ o)
    normed = kept(h / np.sqrt((h * h).mean(-1, keepdims=True) + given.norm_eps) * scale)
    gate, up = np.moveaxis(np.einsum("MD,DcF->McF", normed, up, optimize=True), 1, 0)
    return kept(h + kept(gate / (1 + np.exp(-gate)) * up) @ down)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt((np.asarray(x, np.float64) ** 2).mean()))


# Tokens, D, F, E and stages; on a cluster of two blocks, so that of some products every block has several rounds.
INTERPRETED = {
    "one token": (1, 192, 1024, 1024, 2),
    "three stages, ragged columns, no projection before": (3, 320, 1600, None, 3),
    "two owners": (16, 320, 1088, 1536, 2),
}


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_is_as_exact_as_its_roundings_and_as_xla(name):
    *sizes, stages = INTERPRETED[name]
    given = arguments(*sizes, normal=on_the_host())
    with interpreted():
        found = jax.block_until_ready(mosaic_gpu.streaming_mlp(given, config=MLPConfig(stages, 1, exchange="gmem")))
    true = exact(given, rounded=False)
    for bound in (exact(given, rounded=True), np.asarray(call(given, "xla"), np.float64)):
        assert rms(np.asarray(found, np.float64) - true) <= 1.1 * rms(bound - true)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("E", [None, 96])
def test_other_implementations_equal_float64(implementation, E):
    given = arguments(5, 128, 192, E, jnp.float32, on_the_host())
    np.testing.assert_allclose(call(given, implementation), exact(given, rounded=False), atol=2e-5)


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        *((tokens, LLAMA_3_8B) for tokens in (1, 20)),
        (32, (8192, 28672, 8192)),
        (1, (3584, 18944, None)),
    ],
)
def test_real_shapes_lower_without_a_copy_of_a_weight(tokens, sizes):
    given = jax.eval_shape(lambda: arguments(tokens, *sizes))
    text = lower(call, given, implementation="mosaic_gpu")
    assert text.count("mosaic_gpu") >= 1
    assert not re.search("stablehlo.(transpose|dot_general)", text)


@pytest.mark.parametrize("tokens", [1, 16, 32])
def test_all_blocks_fit_the_card_and_most_work_all_the_time(tokens):
    shapes = [Shape.of(product) for product in products(jax.eval_shape(lambda: arguments(tokens, *LLAMA_3_8B)))]
    config = configs.mlp_config_for(shapes)
    assert config is not None
    config.check(shapes)
    assert configs.CLUSTER * config.clusters <= configs.MULTIPROCESSORS
    tiles = sum(c.tiles(shape) * c.steps(shape) * c.split for c, shape in zip(config.of(shapes), shapes, strict=True))
    assert tiles / (configs.CLUSTER * config.clusters * config.steps(shapes)) >= 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": 1}, "stages is 1; allowed: at least 2"),
        ({"clusters": 0}, "clusters is 0; allowed: 1 to 66"),
        ({"clusters": 67}, "clusters is 67; allowed: 1 to 66"),
    ],
)
def test_a_config_is_valid(change, message):
    with pytest.raises(ValueError, match=message):
        replace(MLPConfig(2, 1), **change)


def test_shared_memory_is_what_the_launch_takes(monkeypatch):
    """The compiler tells what it would take when that is too much."""
    given = jax.eval_shape(lambda: arguments(16, 16384, 32768, 16384))
    config = MLPConfig(stages=16, clusters=64)
    monkeypatch.setattr(configs, "SHARED_BYTES", 1 << 30)
    with pytest.raises(ValueError, match="exceeds available shared memory") as error:
        lower(lambda given: mosaic_gpu.streaming_mlp(given, config=config), given)
    (taken,) = re.findall(r"\bsmem_bytes=(\d+)", str(error.value))
    shapes = [Shape.of(product) for product in products(given)]
    counted = configs.smem_bytes(*zip(config.of(shapes), shapes, strict=True))
    assert counted - configs.SMEM_OVERHEAD <= int(taken) <= counted


def floats(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


GIVEN = {
    "x_MD": floats(3, 1024),
    "up_DcF": floats(1024, 2, 2048),
    "down_FD": floats(2048, 1024),
    "norm_scale_D": floats(1024),
    "attended_ME": floats(3, 1024),
    "o_ED": floats(1024, 1024),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_MD": floats(3, 1, 1024)}, r"x.shape .*the axes MD"),
        ({"x_MD": floats(0, 1024), "attended_ME": floats(0, 1024)}, r"^x.shape is \(0, 1024\); .* MD at least 1"),
        ({"attended_ME": floats(3, 0), "o_ED": floats(0, 1024)}, r"attended.shape is \(3, 0\); .* ME at least 1"),
        ({"up_DcF": floats(1024, 2, 0)}, r"up.shape is \(1024, 2, 0\); .* DcF at least 1"),
        ({"up_DcF": floats(1024, 4096)}, r"up.shape .*the axes DcF"),
        ({"up_DcF": floats(1024, 3, 2048)}, r"up.shape .*\(1024, 2, 2048\)"),
        ({"down_FD": floats(1024, 1024)}, r"down.shape .*\(2048, 1024\)"),
        ({"norm_scale_D": floats(512)}, r"norm_scale.shape .*\(1024,\)"),
        ({"o_ED": None}, "attended is an array; allowed: an array with o, None without"),
        ({"attended_ME": None}, "attended is None; allowed: an array with o, None without"),
        ({"attended_ME": floats(4, 1024)}, r"attended.shape .*\(3, 1024\)"),
        ({"o_ED": floats(1024, 512)}, r"o.shape .*\(1024, 1024\)"),
        ({"down_FD": floats(2048, 1024, dtype=jnp.float32)}, "down.dtype is float32; allowed: bfloat16, as x"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0"),
        ({"norm_scale_D": None}, "norm_scale is a NoneType; allowed: an array"),
        ({"down_FD": [1.0]}, "down is a list; allowed: an array"),
        ({"implementation": "cuda"}, "implementation='cuda' of streaming_mlp does not exist"),
        ({"implementation": ["xla"]}, r"implementation=\['xla'\] of streaming_mlp does not exist"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(change)


def evaluate(change: dict) -> jax.ShapeDtypeStruct:
    given = GIVEN | change
    static = {name: value for name, value in given.items() if name in ("norm_eps", "implementation")}
    arrays = {name: value for name, value in given.items() if name not in static}
    return jax.eval_shape(lambda arrays: streaming_mlp(**arrays, **static), arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_MD": floats(33, 1024), "attended_ME": floats(33, 1024)}, r"x.shape is \(33, 1024\); .* 32 tokens"),
        (
            {"up_DcF": floats(1024, 2, 512), "down_FD": floats(512, 1024)},
            r"down.shape is \(512, 1024\); allowed: F at least 1024, 2 tiles for each of 2 blocks",
        ),
    ],
)
def test_the_kernel_says_what_it_does_not_take(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(change | {"implementation": "mosaic_gpu"})
    assert evaluate(change).shape == (GIVEN | change)["x_MD"].shape  # auto: XLA


def test_the_kernel_is_what_auto_takes_on_a_hopper_gpu(monkeypatch):
    x, up, down, scale, attended, o = GIVEN.values()
    options = {"norm_scale_D": scale, "attended_ME": attended, "o_ED": o}
    assert not takes_mlp(x, up, down, **options)
    monkeypatch.setattr(dispatch, "compute_capability", lambda: dispatch.HOPPER)
    assert takes_mlp(x, up, down, **options)


def test_blocks_that_wait_for_each_other_are_not_more_than_a_gpu_holds(monkeypatch):
    """A part of a card, and some that are sold as H100 or H20, have fewer multiprocessors: the kernel would hang."""
    monkeypatch.setattr(dispatch, "compute_capability", lambda: dispatch.HOPPER)
    monkeypatch.setattr(dispatch, "multiprocessors", lambda: 114)
    with pytest.raises(ValueError, match="this GPU has 114 multiprocessors; at least 132"):
        evaluate({"implementation": "mosaic_gpu"})
    x, up, down, scale, attended, o = GIVEN.values()
    assert not takes_mlp(x, up, down, norm_scale_D=scale, attended_ME=attended, o_ED=o)


ON_A_GPU = [
    *((tokens, LLAMA_3_8B) for tokens in (1, 3, 16, 20, 32)),
    *((tokens, (3584, 18944, None)) for tokens in (1, 3, 20, 32)),
    *((tokens, (8192, 4096, 2048)) for tokens in (1, 3, 16, 20)),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "sizes"), ON_A_GPU)
def test_on_a_gpu_as_exact_as_xla_and_the_same_every_time(tokens, sizes):
    given = jax.jit(lambda: arguments(tokens, *sizes))()
    first, second, third = (np.asarray(mosaic_gpu.streaming_mlp(given), np.float64) for _ in range(3))
    true, by_xla = exact(given, rounded=False), np.asarray(call(given, "xla"), np.float64)
    assert rms(first - true) <= 1.1 * rms(by_xla - true)
    np.testing.assert_array_equal(second, first)
    np.testing.assert_array_equal(third, first)

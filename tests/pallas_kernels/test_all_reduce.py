"""The all-reduce: XLA's against float64, what the kernel's program is, what is refused; and the kernel on two GPUs."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer.parallel import CONTEXT, PIPE, TENSOR, make_mesh
from pallas_kernels import dispatch
from pallas_kernels.all_reduce import Workspace, all_reduce, config, fresh_workspace, new_workspace
from pallas_kernels.all_reduce.config import vector_size
from tests.pallas_kernels.gpu_program import lower

EPS = 1e-5
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # of a number, relative
ROWS = 64


def draw(shape: tuple[int, ...], dtype: str, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.dtype(dtype))


def on_devices(mesh, function, *arguments):
    """`function` on every device of its part of arguments; what each returns, with a leading axis of devices."""
    with jax.set_mesh(mesh):
        local = lambda *arguments: jax.tree.map(lambda x: x[None], function(*arguments))  # noqa: E731
        specs = tuple(spec for spec, _ in arguments)
        mapped = jax.shard_map(local, in_specs=specs, out_specs=P(TENSOR), check_vma=False)
        return jax.jit(mapped)(*(placed(mesh, spec, array) for spec, array in arguments))


def placed(mesh, spec, arrays):
    return jax.tree.map(lambda array: jax.device_put(array, NamedSharding(mesh, spec)), arrays)


def call(partial_1TD, residual_TD, scale_D, workspace=None, **options):
    """On one device."""
    given = {"residual_TD": residual_TD, "norm_scale_D": scale_D, "norm_eps": EPS, "workspace": workspace}
    return all_reduce(partial_1TD[0], TENSOR, **given, **options)


def exact(partials, residual):
    total = np.asarray(partials, np.float64).sum(axis=0)
    return total if residual is None else total + np.asarray(residual, np.float64)


def assert_exact(result, partials, residual, scale, dtype: str, roundings: int) -> None:
    """On every device, within so many roundings of partial sums; the norm within its own rounding."""
    out, normed = (None if array is None else np.asarray(array) for array in result)
    largest = np.abs(np.asarray(partials, np.float64)).sum(axis=0)
    largest = largest if residual is None else largest + np.abs(np.asarray(residual, np.float64))
    for device in range(len(out)):
        np.testing.assert_array_equal(out[device], out[0])
        error = np.abs(out[device].astype(np.float64) - exact(partials, residual))
        assert (error <= roundings * ROUNDING[dtype] * largest + 1e-6).all()
        assert (normed is None) == (scale is None)
        if normed is not None:
            x = out[device].astype(np.float64)
            expected = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * np.asarray(scale, np.float64)
            error = np.abs(normed[device].astype(np.float64) - expected)
            assert (error <= (ROUNDING[dtype] + 1e-5) * np.abs(expected) + 1e-30).all()


def arrays(devices: int, tokens: int, hidden: int, dtype: str, residual: bool, norm: bool, seed: int = 0):
    partials = draw((devices, tokens, hidden), dtype, seed)
    x = draw((tokens, hidden), dtype, seed + 1) if residual else None
    return partials, x, draw((hidden,), dtype, seed + 2) if norm else None


@pytest.mark.parametrize("implementation", ["xla", "reference", "auto"])
@pytest.mark.parametrize(("devices", "tokens", "hidden", "dtype", "residual", "norm"), [
    (2, 1, 128, "bfloat16", True, True), (4, 3, 96, "float32", False, True), (8, 5, 64, "float16", True, False),
    (1, 2, 64, "float32", False, False),
])  # fmt: skip
def test_plain_sums_are_those_of_float64(implementation, devices, tokens, hidden, dtype, residual, norm):
    partials, x, scale = arrays(devices, tokens, hidden, dtype, residual, norm)
    run = partial(call, implementation=implementation)
    result = on_devices(make_mesh(devices), run, (P(TENSOR), partials), (P(), x), (P(), scale))
    assert_exact(result, partials, x, scale, dtype, roundings=devices + 1)


def program(tokens: int, hidden: int, dtype: str, workspace: bool, devices: int = 2, norm: bool = True) -> str:
    """What the kernel is for GPUs that are not there."""
    mesh, dtypes = make_mesh(devices), jnp.dtype(dtype)

    def of(shape, spec):
        return jax.ShapeDtypeStruct(shape, dtypes, sharding=NamedSharding(mesh, spec))

    given = [of((devices, tokens, hidden), P(TENSOR)), of((tokens, hidden), P()), of((hidden,), P()) if norm else None]
    if workspace:
        given.append(new_workspace(mesh, TENSOR, ROWS, hidden, dtype))
    specs = (P(TENSOR), P(), P(), P(TENSOR))[: len(given)]
    with jax.set_mesh(mesh):
        run = partial(call, implementation="mosaic_gpu")
        return lower(jax.shard_map(run, in_specs=specs, out_specs=P(), check_vma=False), *given)


@pytest.mark.parametrize(("devices", "tokens", "hidden", "dtype", "workspace", "norm"), [
    (2, 1, 4096, "bfloat16", True, True), (4, 16, 2560, "float16", True, False), (2, 3, 8192, "float32", False, True),
])  # fmt: skip
def test_it_is_one_kernel_that_reaches_all_devices_without_multicast(devices, tokens, hidden, dtype, workspace, norm):
    text = program(tokens, hidden, dtype, workspace, devices, norm)
    assert text.count("custom_call @mosaic_gpu_v2") == (1 if workspace else 2)  # and what makes fresh memory
    assert "stablehlo.all_reduce" not in text
    assert f'xla_replica_ids = "{",".join(map(str, range(devices)))}"' in text
    assert "uses_xla_collective_metadata = true" in text
    # Fresh memory needs all devices to be past its making; memory that lasts does not.
    barriers = re.findall(
        r"skip_device_barrier = (\w+), use_custom_barrier = \w+, uses_xla_collective_metadata = true", text
    )
    assert barriers == [str(workspace).lower()]
    assert "red.release.sys" in text
    assert "multimem" not in text


def test_multicast_would_be_seen():
    def kernel(x_ref, out_ref, everyone):
        plgpu.semaphore_signal_multicast(everyone, collective_axes=(PIPE, TENSOR, CONTEXT))
        pl.semaphore_wait(everyone, 2)
        out_ref[...] = x_ref[...]

    x = jax.ShapeDtypeStruct((128,), jnp.float32)
    planted = plgpu.kernel(kernel, out_type=x, scratch_types=[plgpu.SemaphoreType.REGULAR])
    with jax.set_mesh(make_mesh(2)):
        assert "multimem" in lower(jax.shard_map(planted, in_specs=P(), out_specs=P(), check_vma=False), x)


def test_a_thread_reads_up_to_16_bytes_at_once():
    sizes = {(hidden, dtype): vector_size(hidden, jnp.dtype(dtype)) for hidden, dtype in [
        (4096, "bfloat16"), (2560, "bfloat16"), (640, "float16"), (4096, "float32"), (768, "float32"),
    ]}  # fmt: skip
    assert [*sizes.values()] == [8, 4, 1, 4, 2]


GOOD = {"devices": 2, "tokens": 4, "hidden": 128, "dtype": "float32", "residual": True, "norm": True}


def wrong(change: dict, message: str, mesh=None):
    partials, x, scale = arrays(**GOOD)
    given = {"partial_TD": partials[0], "axis": TENSOR, "residual_TD": x, "norm_scale_D": scale} | change
    reduce = lambda: all_reduce(**given).out_TD  # noqa: E731
    with jax.set_mesh(mesh or make_mesh(2)), pytest.raises(ValueError, match=message):
        jax.eval_shape(jax.shard_map(reduce, in_specs=(), out_specs=P(), check_vma=False))


@pytest.mark.parametrize(("change", "message"), [
    ({"partial_TD": [1.0]}, "partial is a list; allowed: an array"),
    ({"partial_TD": jnp.ones((4, 2, 128))}, r"partial.shape is \(4, 2, 128\); allowed: the axes TD"),
    ({"partial_TD": jnp.ones((0, 128))}, r"partial.shape is \(0, 128\); allowed: every one .* at least 1"),
    ({"partial_TD": jnp.ones((4, 128), jnp.int32)}, "partial.dtype is int32; allowed: float32, bfloat16, float16"),
    ({"axis": "rows"}, "axis is 'rows'; allowed: a mesh axis"),
    ({"axis": 0}, "axis is 0; allowed: a mesh axis"),
    ({"residual_TD": jnp.ones((4, 64))}, r"residual.shape is \(4, 64\); allowed: \(4, 128\), as partial"),
    ({"residual_TD": jnp.ones((4, 128), jnp.int32)}, "residual.dtype is int32"),
    ({"norm_scale_D": jnp.ones((1, 128))}, r"norm_scale.shape is \(1, 128\); allowed: \(128,\)"),
    ({"norm_eps": -1.0}, "norm_eps is -1.0; allowed: a finite number, at least 0"),
    ({"workspace": jnp.ones(3)}, "workspace is a .*Array.*; allowed: None or what `new_workspace` made"),
    ({"workspace": Workspace(jnp.ones((8, 2, 2, 64)), jnp.ones((8, 3), jnp.int32))},
     r"workspace.inbox.shape is \(8, 2, 2, 64\); allowed: messages of 128 numbers from 2 devices"),
    ({"workspace": Workspace(jnp.ones((8, 2, 2, 128), jnp.bfloat16), jnp.ones((8, 3), jnp.int32))},
     "workspace.inbox.dtype is bfloat16; allowed: float32, as partial"),
    ({"implementation": "nccl"}, "'nccl' of all_reduce does not exist; allowed: auto, mosaic_gpu, xla, reference"),
    ({"implementation": "mosaic_gpu", "workspace": Workspace(jnp.ones((3, 2, 2, 128)), jnp.ones((3, 3), jnp.int32))},
     r"partial.shape is \(4, 128\); allowed: at most 3 tokens, the rows of workspace"),
    ({"implementation": "mosaic_gpu", "partial_TD": jnp.ones((4, 96)), "residual_TD": None, "norm_scale_D": None},
     r"partial.shape is \(4, 96\); allowed: D a multiple of 128, up to 8192"),
])  # fmt: skip
def test_it_names_what_is_wrong(change, message):
    wrong(change, message)


def test_one_device_has_no_other_to_send_to():
    change = {"partial_TD": jnp.ones((4, 128)), "implementation": "mosaic_gpu"}
    wrong(change, "cannot run: the axis 'tensor' has one device", make_mesh(1))


@pytest.mark.parametrize(("change", "message"), [
    ({"axis": "rows"}, "axis is 'rows'; allowed: an axis of the mesh: pipe, tensor, context"),
    ({"rows": 0}, "rows is 0; allowed: at least 1"),
    ({"hidden": 0}, "hidden is 0; allowed: at least 1"),
])  # fmt: skip
def test_a_workspace_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        new_workspace(**{"mesh": make_mesh(2), "axis": TENSOR, "rows": 4, "hidden": 128, "dtype": "float32"} | change)


def test_a_workspace_on_devices_that_the_kernel_does_not_find():
    with pytest.raises(ValueError, match=r"mesh.devices is those with ids \[2, 3\]; allowed: the first ones in order"):
        new_workspace(make_mesh(2, devices=jax.devices()[2:]), TENSOR, 4, 128, "float32")


def test_auto_takes_xla_from_a_size_on(monkeypatch):
    monkeypatch.setattr(dispatch, "compute_capability", lambda: dispatch.HOPPER)
    monkeypatch.setattr(config, "LARGEST_MESSAGE", 65536)
    chosen = []
    monkeypatch.setattr(
        dispatch, "choose", lambda op, name, available, refusals: chosen.append(refusals) or available["xla"]
    )
    for tokens in (16, 17):
        given = jnp.ones((tokens, 1024), jnp.float32)
        with jax.set_mesh(make_mesh(2)):
            reduce = lambda given: all_reduce(given, TENSOR).out_TD  # noqa: E731
            jax.eval_shape(jax.shard_map(reduce, in_specs=P(), out_specs=P(), check_vma=False), given)
    assert [refusals[dispatch.KERNEL] for refusals in chosen] == [
        None, "XLA is faster with messages of more than 65536 bytes"
    ]  # fmt: skip


# On two GPUs or more.

SHAPES = [(1, 4096), (16, 4096), (3, 4096), (64, 4096), (2, 4096), (33, 4096)]  # one after the other, one workspace


@pytest.fixture
def mesh():
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    return make_mesh(len(jax.devices()))


def delayed(x_TD: jax.Array, rounds: jax.Array, after: jax.Array) -> jax.Array:
    """x, a while after `after` is known: a loop whose length the device does not know before."""
    start = jnp.where(after[0, 0] == 1e9, 2.0, 1.0)
    y = lax.fori_loop(0, rounds, lambda i, y: y * 1.0001 + i.astype(jnp.float32), start)
    return x_TD + jnp.where(y == -1.0, 1.0, 0.0).astype(x_TD.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("lasting", [False, True], ids=["fresh memory", "workspace"])
@pytest.mark.parametrize(("tokens", "hidden", "dtype", "residual", "norm"), [
    (1, 4096, "bfloat16", True, True), (16, 8192, "bfloat16", True, True), (5, 2560, "float16", True, False),
    (64, 640, "bfloat16", False, True), (7, 1024, "float32", True, True), (132, 128, "float32", False, False),
])  # fmt: skip
def test_the_kernel_is_exact_and_the_same_on_all_devices(mesh, lasting, tokens, hidden, dtype, residual, norm):
    devices = mesh.shape[TENSOR]
    space = new_workspace(mesh, TENSOR, tokens, hidden, dtype) if lasting else None
    partials, x, scale = arrays(devices, tokens, hidden, dtype, residual, norm)
    given = (P(TENSOR), partials), (P(), x), (P(), scale), (P(TENSOR), space)
    result = on_devices(mesh, partial(call, implementation="mosaic_gpu"), *given)
    float32_sums = devices * ROUNDING["float32"] / ROUNDING[dtype]
    assert_exact(result, partials, x, scale, dtype, roundings=1 + float32_sums)
    if space is not None:
        assert_left_in_order(space, devices, tokens, turn=1)


def assert_left_in_order(space: Workspace, devices: int, rows: int, turn: int) -> None:
    """No count of any device, and all at the same turn."""
    counts = np.asarray(space.counts)
    np.testing.assert_array_equal(counts[:, :devices], 0)
    np.testing.assert_array_equal(counts.reshape(devices, -1, devices + 1)[:, :rows, devices], turn)


@pytest.mark.gpu
@pytest.mark.parametrize("lasting", [False, True], ids=["memory of a program", "lasting memory"])
def test_200_launches_of_devices_that_are_late_by_turns(mesh, lasting):
    """Of many sizes after one another: every one is right, and each device goes on as soon as it can."""
    devices, launches, runs, dtype = mesh.shape[TENSOR], 20, 10, "bfloat16"
    space, rng = new_workspace(mesh, TENSOR, ROWS, 4096, dtype) if lasting else None, np.random.default_rng(0)
    sizes = [SHAPES[i % len(SHAPES)] for i in range(launches)]
    drawn = [arrays(devices, *size, dtype, True, True, seed=i) for i, size in enumerate(sizes)]
    given = [(placed(mesh, P(TENSOR), sums), *placed(mesh, P(), others)) for sums, *others in drawn]

    def run(space, rounds_1L, *given):
        results, first = [], space is None
        space, after = space or fresh_workspace(TENSOR, ROWS, 4096, dtype), given[0][1]
        for i, (partial_1TD, x, scale) in enumerate(given):
            late_1TD = delayed(partial_1TD[0], rounds_1L[0, i], after)[None]
            results.append(call(late_1TD, x, scale, space, first=first and i == 0, implementation="mosaic_gpu"))
            after = results[-1].out_TD
        return results

    specs = P(TENSOR), P(TENSOR), *[(P(TENSOR), P(), P())] * launches
    local = lambda *given: jax.tree.map(lambda x: x[None], run(*given))  # noqa: E731
    with jax.set_mesh(mesh):
        mapped = jax.jit(jax.shard_map(local, in_specs=specs, out_specs=P(TENSOR), check_vma=False))
        for _ in range(runs):
            rounds = rng.integers(0, 20, (devices, launches)) * rng.integers(0, 2, (devices, launches))
            results = mapped(space, placed(mesh, P(TENSOR), jnp.asarray(rounds, jnp.int32)), *given)
            for result, arguments in zip(results, given, strict=True):
                assert_exact(result, *arguments, dtype, roundings=1.01)
    if space is not None:
        assert_left_in_order(space, devices, 1, turn=launches * runs % 2)


@pytest.mark.gpu
def test_a_loop_on_the_device_copies_no_workspace(mesh):
    """A copy would have counts of its own, and a device that is ahead would count in the wrong one."""
    space = new_workspace(mesh, TENSOR, 1, 4096, "bfloat16")
    partials, *others = arrays(mesh.shape[TENSOR], 1, 4096, "bfloat16", True, True)
    given = placed(mesh, P(TENSOR), partials), *placed(mesh, P(), others), space

    def run(partial_1TD, x, scale, space):
        step = lambda _, y: call(y[None], x, scale, space, implementation="mosaic_gpu").normed_TD  # noqa: E731
        return lax.fori_loop(0, 50, step, partial_1TD[0])[None]

    specs = P(TENSOR), P(), P(), P(TENSOR)
    with jax.set_mesh(mesh):
        mapped = jax.jit(jax.shard_map(run, in_specs=specs, out_specs=P(TENSOR), check_vma=False))
        compiled = mapped.lower(*given).compile()
        inbox = ",".join(map(str, space.inbox.sharding.shard_shape(space.inbox.shape)))
        assert re.findall(rf"bf16\[{inbox}\]\S* copy\(", compiled.as_text()) == []
        result = np.asarray(mapped(*given))
    for device in result:
        np.testing.assert_array_equal(device, result[0])
    assert_left_in_order(space, mesh.shape[TENSOR], 1, turn=0)

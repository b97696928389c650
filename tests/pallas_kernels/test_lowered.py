"""A kernel is lowered once, whatever programs call it, is in all of them, and is kept for later processes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from jaxinfer.parallel import make_mesh
from pallas_kernels import lowered

X = jax.ShapeDtypeStruct((128,), jnp.float32)


@pytest.fixture(autouse=True)
def a_gpu_to_lower_for(monkeypatch):
    monkeypatch.setattr(lowered, "_on_gpu", lambda: True)
    monkeypatch.setattr(lowered, "_lowered", {})


class Adder:
    """Calls that add a number, by a kernel that counts how often it is traced."""

    def __init__(self):
        self.traced = 0

    def __call__(self, x: jax.Array, number: int) -> jax.Array:
        def kernel(x_ref, out_ref):
            self.traced += 1
            out_ref[...] = x_ref[...] + number

        run = plgpu.kernel(kernel, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype))
        return lowered.once(run, ("add", number), x)[0]


def text_of(program, *arguments) -> str:
    return jax.jit(program).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def test_programs_share_a_kernel():
    add = Adder()
    texts = [text_of(program, X) for program in (lambda x: add(x, 1), lambda x: 2 * add(x + 1, 1))]
    assert add.traced == 1
    assert all(text.count("@mosaic_gpu_v2") == 1 for text in texts)


@pytest.mark.parametrize(("x", "number"), [
    (X, 2), (jax.ShapeDtypeStruct((256,), jnp.float32), 1), (jax.ShapeDtypeStruct((128,), jnp.int32), 1)
])  # fmt: skip
def test_another_key_shape_or_dtype_is_another_kernel(x, number):
    add = Adder()
    text_of(lambda x: add(x, 1), X)
    assert "@mosaic_gpu_v2" in text_of(lambda x: add(x, number), x)
    assert add.traced == 2


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (2, 4)])
def test_devices_of_a_mesh_share_it_too(sizes):
    """Lowered for one device alone, it runs on every one with its own part, whichever program met it first."""
    add = Adder()
    for size in sizes:
        mesh = make_mesh(size)
        with jax.set_mesh(mesh):
            x = jax.ShapeDtypeStruct((128 * size,), jnp.float32, sharding=jax.NamedSharding(mesh, P("tensor")))
            local = jax.shard_map(lambda x: add(x, 1), in_specs=P("tensor"), out_specs=P("tensor"), check_vma=False)
            assert "@mosaic_gpu_v2" in text_of(local, x)
    assert add.traced == 1


def test_without_a_gpu_the_kernel_is_called_as_it_is(monkeypatch):
    monkeypatch.setattr(lowered, "_on_gpu", lambda: False)
    assert lowered.once(lambda x: x + 1, "plain", 1) == [2]
    assert not lowered._lowered


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where kernels are kept."""
    monkeypatch.setattr(lowered, "_folder", lambda: tmp_path / "kernels")
    return tmp_path / "kernels"


@pytest.fixture
def later(monkeypatch):
    """What a later process lowers: a program that adds a number, and how often it traced the kernel."""

    def lower(number: int = 1) -> tuple[str, int]:
        monkeypatch.setattr(lowered, "_lowered", {})
        add = Adder()
        return text_of(lambda x: add(x, number), X), add.traced

    return lower


def test_a_later_process_reads_the_kernel(folder, later):
    text, traced = later()
    assert traced == 1
    assert later() == (text, 0)
    assert len([*folder.iterdir()]) == 1


def test_other_kernels_and_other_versions_are_lowered(monkeypatch, folder, later):
    assert [later(number)[1] for number in (1, 2, 2)] == [1, 1, 0]
    monkeypatch.setattr(lowered, "_made_by", lambda: "another")
    assert [later()[1] for _ in range(2)] == [1, 0]


def test_a_file_that_cannot_be_read_is_written_anew(folder, later, caplog):
    later()
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert later()[1] == 1
    assert f"the kernel in {file} cannot be read" in caplog.text
    assert later()[1] == 0


def test_a_folder_that_cannot_be_written_is_said(folder, later, caplog):
    folder.write_text("a file")
    assert later()[1] == 1
    assert "the kernel is not kept in" in caplog.text


def test_a_disk_that_is_full_leaves_nothing_behind(monkeypatch, folder, later, caplog):
    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lowered.os, "replace", full)
        assert later()[1] == 1
    assert "No space left on device" in caplog.text
    assert [*folder.iterdir()] == []


def folder_where(cache: str | None, enabled: bool) -> Path | None:
    """Where kernels are kept with these settings of JAX's own cache."""
    settings = {"jax_compilation_cache_dir": cache, "jax_enable_compilation_cache": enabled}
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        return lowered._folder()
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.mark.parametrize(("cache", "enabled", "kept"), [
    ("/a", True, Path("/a/kernels")), ("/a", False, None), (None, True, None), ("gs://a", True, None)
])  # fmt: skip
def test_kernels_are_kept_beside_what_xla_compiled(cache, enabled, kept):
    assert folder_where(cache, enabled) == kept


def test_without_flatbuffers_nothing_is_kept(monkeypatch, caplog):
    monkeypatch.setattr(lowered.importlib.util, "find_spec", lambda name: None)
    lowered._say_what_is_missing.cache_clear()
    with caplog.at_level("INFO", lowered.__name__):
        assert folder_where("/a", enabled=True) is None
    assert "needs the package flatbuffers" in caplog.text


def test_who_made_a_kernel_is_the_versions_and_the_source():
    assert f"jax {jax.__version__}, jaxlib" in lowered._made_by()
    assert lowered._made_by() == lowered._made_by.__wrapped__()

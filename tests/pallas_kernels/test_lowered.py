"""A kernel is lowered once, whatever programs call it, and is in all of them."""

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
        return lowered.once(run, ("add", number), x)


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


def test_devices_of_a_mesh_share_it_too():
    """Lowered for one device alone, it runs on every one with its own part."""
    add, mesh = Adder(), make_mesh(2)
    text_of(lambda x: add(x, 1), X)
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((256,), jnp.float32, sharding=jax.NamedSharding(mesh, P("tensor")))
        local = jax.shard_map(lambda x: add(x, 1), in_specs=P("tensor"), out_specs=P("tensor"), check_vma=False)
        assert "@mosaic_gpu_v2" in text_of(local, x)
    assert add.traced == 1


def test_without_a_gpu_the_kernel_is_called_as_it_is(monkeypatch):
    monkeypatch.setattr(lowered, "_on_gpu", lambda: False)
    assert lowered.once(lambda x: x + 1, "plain", 1) == 2
    assert not lowered._lowered

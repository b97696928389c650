import io
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from jaxinfer.cli import doctor
from jaxinfer.roofline import find_hardware
from pallas_kernels import dispatch, flash_decoding, streaming_matmul


def printed(table) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def test_tables_name_versions_devices_and_speed():
    assert jax.__version__ in printed(doctor.versions())
    assert printed(doctor.devices()).count(jax.devices()[0].device_kind) >= jax.device_count()
    speed = printed(doctor.speed(find_hardware("h200-measured")))
    for row in ("memory", "bf16 matmul", "fp32 matmul", "kernel after kernel"):
        assert row in speed


CPU = "no kernel written for the backend 'cpu' exists"
KERNELS, CUDNN = "the kernels need compute capability 9.0", "cuDNN's attention needs compute capability 8.0"
ON = {  # a GPU: what runs of attention and of products, by `auto` and by name also, and what cannot
    (9, 0): (["mosaic_gpu", "cudnn, xla, reference", "-"], ["mosaic_gpu", "xla, reference", "-"]),
    (8, 0): (
        ["cudnn", "xla, reference", f"mosaic_gpu: {KERNELS}, and this GPU has 8.0"],
        ["xla", "reference", f"mosaic_gpu: {KERNELS}, and this GPU has 8.0"],
    ),
    (7, 5): (
        ["xla", "reference", f"mosaic_gpu: {KERNELS}, and this GPU has 7.5; cudnn: {CUDNN}, and this GPU has 7.5"],
        ["xla", "reference", f"mosaic_gpu: {KERNELS}, and this GPU has 7.5"],
    ),
    None: (["xla", "reference", f"mosaic_gpu, cudnn: {CPU}"], ["xla", "reference", f"mosaic_gpu: {CPU}"]),
}


@pytest.mark.parametrize("found", ON, ids=str)
def test_every_implementation_runs_or_is_given_a_reason(found, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu" if found else "cpu")
    monkeypatch.setattr(dispatch, "compute_capability", lambda: found)
    attention, products = ON[found]
    rows = [line for line in printed(doctor.kernels()).splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row.split("│")[1:-1]] for row in rows] == [
        ["flash_attention", *attention],
        ["flash_decoding", *attention],
        ["streaming_matmul", *products],
        ["streaming_mlp", *products],
        ["tiled_matmul", *products],
    ]


@pytest.mark.parametrize("found", [found for found in ON if found], ids=str)
def test_what_is_said_to_run_by_name_is_what_is_chosen_by_name(found, monkeypatch):
    monkeypatch.setattr(dispatch, "compute_capability", lambda: found)
    for name, run in flash_decoding.IMPLEMENTATIONS.items():
        if reason := dispatch.cannot_run(name):
            with pytest.raises(ValueError, match=re.escape(reason)):
                dispatch.choose("flash_decoding", name, flash_decoding.IMPLEMENTATIONS, {})
        else:
            assert dispatch.choose("flash_decoding", name, flash_decoding.IMPLEMENTATIONS, {}) is run


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a CPU does")
def test_without_a_gpu_a_kernel_can_be_lowered_but_does_not_run():
    assert dispatch.cannot_run(dispatch.KERNEL) == CPU
    choose = partial(dispatch.choose, "flash_decoding", dispatch.KERNEL, flash_decoding.IMPLEMENTATIONS)
    assert choose({}) is flash_decoding.IMPLEMENTATIONS[dispatch.KERNEL]
    x_MD, w_DN = jnp.ones((8, 256), jnp.bfloat16), jnp.ones((256, 256), jnp.bfloat16)
    with pytest.raises(ValueError, match=f"'mosaic_gpu' of streaming_matmul cannot run: {re.escape(CPU)}"):
        streaming_matmul.streaming_matmul(x_MD, w_DN, implementation=dispatch.KERNEL)

import io

import jax
from rich.console import Console

from jaxinfer.cli import doctor
from jaxinfer.roofline import find_hardware
from pallas_kernels import dispatch


def printed(table) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def test_tables_name_versions_devices_kernels_and_speed():
    assert jax.__version__ in printed(doctor.versions())
    assert printed(doctor.devices()).count(jax.devices()[0].device_kind) >= jax.device_count()
    kernels, (name, why) = printed(doctor.kernels()), dispatch.automatic()
    others = {
        "flash_attention": "mosaic_gpu, cudnn, reference",
        "flash_decoding": "mosaic_gpu, cudnn, reference",
        "streaming_matmul": "mosaic_gpu, reference",
        "streaming_mlp": "mosaic_gpu, reference",
    }
    for op, by_name in others.items():
        (row,) = (line for line in kernels.splitlines() if op in line)
        assert [cell.strip() for cell in row.split("│")[2:-1]] == [name, by_name, why]
    speed = printed(doctor.speed(find_hardware("h200-measured")))
    for row in ("memory", "bf16 matmul", "fp32 matmul", "kernel after kernel"):
        assert row in speed

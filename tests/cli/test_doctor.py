import io

import jax
import pytest
from rich.console import Console

from jaxinfer.cli import doctor, measure
from jaxinfer.roofline import Hardware
from pallas_kernels import dispatch


@pytest.fixture(scope="module")
def machine() -> Hardware:
    return measure.measure_machine()


def printed(table) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def test_a_measured_machine_has_plausible_ceilings(machine):
    assert 1e8 < machine.bandwidth < 1e13  # slower than a disk or faster than any memory is a wrong unit
    assert 1e8 < machine.rate("bf16") < 1e16
    assert 1e8 < machine.rate("fp32") < 1e16
    assert 0 < machine.overhead < 1e-2
    assert machine.memory > 2**30


def test_tables_name_versions_devices_kernels_and_speed(machine):
    assert jax.__version__ in printed(doctor.versions())
    assert printed(doctor.devices()).count(jax.devices()[0].device_kind) >= jax.device_count()
    kernels, (name, why) = printed(doctor.kernels()), dispatch.automatic()
    for op in ("flash_attention", "flash_decoding"):
        (row,) = (line for line in kernels.splitlines() if op in line)
        assert [cell.strip() for cell in row.split("│")[2:-1]] == [name, "mosaic_gpu, reference", why]
    speed = printed(doctor.speed(machine))
    for row in ("memory", "bf16 matmul", "fp32 matmul", "kernel after kernel"):
        assert row in speed


def test_memory_is_the_allocators_limit_or_the_hosts():
    assert measure.device_memory({"bytes_limit": 123}) == 123
    assert measure.device_memory(None) > 2**30

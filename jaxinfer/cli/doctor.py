"""`jaxinfer doctor`: what runs here, on what, and how fast the machine itself is."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table

from jaxinfer.cli.units import si
from jaxinfer.roofline import Hardware, find_by_device

_PACKAGES = ("jaxinfer", "jax", "jaxlib", "jax-cuda13-plugin", "flax", "orbax-checkpoint", "tokenizers")


def doctor() -> None:
    """Print versions, devices, kernels and memory, and time this machine's memory and matmul."""
    from jaxinfer.machine import measure_machine

    console = Console()
    for table in (versions(), devices(), kernels(), speed(measure_machine())):
        console.print(table)


def versions() -> Table:
    table = Table("package", "version", title="Versions")
    table.add_row("python", platform.python_version())
    for package in _PACKAGES:
        table.add_row(package, _version(package))
    return table


def devices() -> Table:
    import jax

    from jaxinfer.machine import device_memory

    table = Table("device", "kind", "memory", "in use", title=f"Devices: {jax.default_backend()}")
    for device in jax.devices():
        stats = device.memory_stats()
        in_use = si(stats["bytes_in_use"], "B") if stats else "not counted"
        table.add_row(str(device.id), device.device_kind, si(device_memory(stats), "B"), in_use)
    return table


def kernels() -> Table:
    """What `auto` runs for each op here, what else runs when asked for by name, and why the rest cannot."""
    from pallas_kernels import dispatch, flash_attention, flash_decoding, streaming_matmul, tiled_matmul

    ops = {
        "flash_attention": flash_attention.IMPLEMENTATIONS,
        "flash_decoding": flash_decoding.IMPLEMENTATIONS,
        "streaming_matmul": streaming_matmul.IMPLEMENTATIONS,
        "streaming_mlp": streaming_matmul.MLP_IMPLEMENTATIONS,
        "tiled_matmul": tiled_matmul.IMPLEMENTATIONS,
    }
    table = Table("op", "auto runs", "by name also", "cannot run here", title="Kernels")
    for op, implementations in ops.items():
        runs, _ = dispatch.automatic({name: None for name in dispatch.NO_REFUSALS if name in implementations})
        refused: dict[str | None, list[str]] = {}  # by the reason
        for name in implementations:
            refused.setdefault(dispatch.cannot_run(name), []).append(name)
        also = [name for name in refused.pop(None, ()) if name != runs]
        against = [f"{', '.join(names)}: {reason}" for reason, names in refused.items()]
        table.add_row(op, runs, ", ".join(also), "; ".join(against) or "-")
    return table


def speed(hardware: Hardware) -> Table:
    """Measured ceilings beside those of the datasheet, where there is one."""
    table = Table("", "measured", "datasheet", title=f"Speed: {hardware.name}")
    stated = find_by_device(hardware.device_kind)
    table.add_row("memory", si(hardware.bandwidth, "B/s"), si(stated.bandwidth, "B/s") if stated else "unknown")
    for dtype in ("bf16", "fp32"):
        peak = si(stated.rate(dtype), "FLOP/s") if stated and dtype in stated.flops else "unknown"
        table.add_row(f"{dtype} matmul", si(hardware.rate(dtype), "FLOP/s"), peak)
    table.add_row("kernel after kernel", si(hardware.overhead, "s"), "unknown")
    return table


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

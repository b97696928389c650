"""This machine: its memory, and its ceilings, what memory and matmuls reach when nothing else is asked of them."""

from __future__ import annotations

import functools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxinfer.roofline import DATASHEETS, MEASURED, Hardware, find_by_device

_DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}
_ARRAY_BYTES = {"cpu": 2**26, "gpu": 2**32, "tpu": 2**32}  # far beyond the caches, and soon done
_MATMUL_SIZES = {"cpu": {"bf16": 512, "fp16": 512, "fp32": 512}}
_LARGE_MATMULS = {"bf16": 8192, "fp16": 8192, "fp32": 4096}
_CHAIN = 64  # matmuls too small to take time, one after the other
_CALLS = 8  # dispatched back to back, so that the host's part hides behind the device's
_ROUNDS = 2

logger = logging.getLogger(__name__)


def measure_machine() -> Hardware:
    """Times memory, matmul and the constant cost of a kernel on the first device, in about a second.

    Returns:
        The device's datasheet entry with the measured ceilings in it; what a message takes, which one device cannot
        time, is that of its measured entry. For a device without an entry, such as a CPU, sizes of caches stand as 0,
        and the links as the memory's bandwidth.
    """
    platform = jax.default_backend()
    bandwidth = _bandwidth(platform)
    flops = {name: _matmul_rate(platform, name) for name in _DTYPES}
    device = _datasheet(bandwidth, flops)
    known = find_by_device(device.device_kind, MEASURED)
    return device.with_ceilings(bandwidth, flops, _kernel_overhead(), known.messages if known else None)


def measured_entry(dtype: str) -> Hardware | None:
    """The measured entry of the first device in the hardware table; None without one, or without a matmul of `dtype`
    in it."""
    return _entry(MEASURED, dtype)


def known_machine(dtype: str) -> Hardware:
    """What times are predicted for here: the measured entry of the first device in the hardware table, or that of its
    datasheet. A device without either, such as a CPU, or with a matmul of `dtype` in neither, is measured, once in a
    process. Logs which.

    Args:
        dtype: of a model without quantization: bf16, fp16 or fp32.
    """
    known = measured_entry(dtype) or _entry(DATASHEETS, dtype)
    machine = known or _measured_once()
    source = "what was measured now" if known is None else f"{machine.name} of the hardware table"
    kind, rates = jax.local_devices()[0].device_kind, (machine.bandwidth, machine.rate(dtype))
    _log_once("times on %s are predicted by %s: %.3g B/s, %.3g FLOP/s", kind, source, *rates)
    return machine


def keep_compiled() -> None:
    """Keeps what XLA compiles and the kernels lowered from now on for later processes, which do neither again.

    In `jaxinfer/compiled` of the user's cache folder, unless JAX was given another (`JAX_COMPILATION_CACHE_DIR`);
    `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing. This is for programs of their own, such as commands: it is a
    setting of the whole process.
    """
    if jax.config.jax_compilation_cache_dir is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "jaxinfer" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # of a model's many programs most are fast
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@dataclass
class Compiled:
    """XLA programs that were made ready.

    Attributes:
        programs: all of them.
        found: those that the persistent compilation cache had; see `keep_compiled`. The others were compiled.
    """

    programs: int = 0
    found: int = 0


@contextmanager
def count_compiled(everywhere: bool = True) -> Iterator[Compiled]:
    """Counts the programs that this process makes ready, in whichever thread or in this one alone, until the block
    ends."""
    seen, here = Compiled(), threading.get_ident()

    def counts() -> bool:
        return everywhere or threading.get_ident() == here

    def count_found(event: str, **_: str | int) -> None:
        seen.found += counts() and event == "/jax/compilation_cache/cache_hits"

    def count_all(event: str, duration_secs: float, **_: str | int) -> None:
        seen.programs += counts() and event == "/jax/core/compile/backend_compile_duration"  # after a hit, too

    jax.monitoring.register_event_listener(count_found)
    jax.monitoring.register_event_duration_secs_listener(count_all)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_listener(count_found)
        jax.monitoring.unregister_event_duration_listener(count_all)


def device_memory(stats: dict[str, int] | None) -> int:
    """Bytes that a program can have: the limit in a device's `memory_stats()`, or the host's memory without one."""
    return (stats or {}).get("bytes_limit") or host_memory()


def host_memory() -> int:
    """Bytes of the host's memory, in use or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _entry(table: Mapping[str, Hardware], dtype: str) -> Hardware | None:
    entry = find_by_device(jax.local_devices()[0].device_kind, table)
    return entry if entry and dtype in entry.flops else None


@functools.cache
def _measured_once() -> Hardware:
    return measure_machine()


@functools.cache
def _log_once(*what: object) -> None:
    logger.info(*what)


def _bandwidth(platform: str) -> float:
    """Bytes per second of the better of a sum, which reads, and a negated copy, which reads and writes. On a CPU the
    copy takes the array's own place: in new memory it would take most of its time to be given the pages."""
    stats = jax.local_devices()[0].memory_stats()
    free = stats["bytes_limit"] - stats["bytes_in_use"] if stats and "bytes_limit" in stats else math.inf
    size = int(min(_ARRAY_BYTES[platform], free // 4))  # beside the copy, and whatever a program holds here
    x_D = jnp.ones(size // 4, jnp.float32)
    read = _seconds(jax.jit(lambda total, x_D: total + jnp.sum(x_D)), jnp.float32(0), x_D)
    copy = _seconds(jax.jit(jnp.negative, donate_argnums=0 if platform == "cpu" else ()), x_D)
    return max(size / read, 2 * size / copy)


def _matmul_rate(platform: str, name: str) -> float:
    """FLOP/s on random numbers: constant ones draw less power, and the clock would stay higher than at work."""
    n = _MATMUL_SIZES.get(platform, _LARGE_MATMULS)[name]
    x_DD = jax.random.normal(jax.random.key(0), (n, n), _DTYPES[name]) * n**-0.5
    multiply = jax.jit(lambda y_DD, x_DD: jnp.matmul(y_DD, x_DD, precision="highest"))
    return 2 * n**3 / _seconds(multiply, x_DD, x_DD)


def _kernel_overhead() -> float:
    """Seconds from one small kernel to the next that waits for it."""

    @jax.jit
    def chain(y_DD: jax.Array, x_DD: jax.Array) -> jax.Array:
        for _ in range(_CHAIN):
            y_DD = y_DD @ x_DD
        return y_DD

    x_DD = jnp.eye(64, dtype=jnp.float32)
    return _seconds(chain, x_DD, x_DD) / _CHAIN


def _seconds(step: Callable[..., jax.Array], carry: jax.Array, *operands: jax.Array) -> float:
    """Seconds of one step, each of which takes the result of the one before; the first, which compiles, is left
    out."""
    carry = step(carry, *operands).block_until_ready()
    rounds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for _ in range(_CALLS):
            carry = step(carry, *operands)
        carry.block_until_ready()
        rounds.append((time.perf_counter() - start) / _CALLS)
    return min(rounds)


def _datasheet(bandwidth: float, flops: dict[str, float]) -> Hardware:
    device = jax.local_devices()[0]
    return find_by_device(device.device_kind) or Hardware(
        name=device.device_kind,
        device_kind=device.device_kind,
        flops=flops,
        bandwidth=bandwidth,
        memory=device_memory(device.memory_stats()),
        l2=0,
        shared_memory=0,
        pcie=bandwidth,
        interconnect=bandwidth,
    )

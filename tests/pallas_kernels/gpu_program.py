"""Mosaic GPU kernels on a machine without a GPU: run in interpret mode, or lowered as far as the compiler's door."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

# Imported ahead of its first use: it adds a setting to JAX, and all that was compiled without would be compiled anew.
from jax._src.pallas.fuser import jaxpr_fusion  # noqa: F401
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

LEAST_POOL = 8  # the threads of an interpreted cluster, and one that waits for them


class RaceError(AssertionError):
    """Two threads of an interpreted kernel touched the same memory without an order, and one of them wrote."""


@contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced inside run on the CPU, and a race in any of them fails the test.

    JAX 0.11 only prints a race and sets a flag, 0.12 raises; here both end in an exception. Trace and run inside
    the context, under `jax.jit` where host code must not wait for every operation.

    Raises:
      RuntimeError: XLA has too few threads. The interpreter makes a program of each thread of a cluster, and a wait
        at a barrier holds the thread of XLA's pool that runs it: where all of them wait for a block whose program got
        none, nothing goes on. The pool has as many threads as the machine has processors or the CPU has devices.
    """
    pool = max(os.cpu_count() or 1, len(jax.devices("cpu")))
    if pool < LEAST_POOL:
        raise RuntimeError(f"XLA has {pool} threads for programs of the CPU; interpreted kernels want {LEAST_POOL}")
    gpu_callbacks.reset_gpu_interpret_mode_state()
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)), _watched() as states:
        yield
        jax.effects_barrier()
    if any(state.races_found for state in states):
        raise RaceError("the interpreter found a race; what it printed names both accesses")


def lower(function: Callable, *arguments: jax.Array | jax.ShapeDtypeStruct, **static) -> str:
    """The StableHLO of a program for an NVIDIA GPU, its kernels through layout inference and lowering.

    What Mosaic GPU's Python part refuses, it refuses here; only the assembler is not asked.
    """
    traced = jax.jit(function, static_argnames=tuple(static)).trace(*arguments, **static)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def array_shapes(function: Callable, *arguments: jax.Array | jax.ShapeDtypeStruct) -> list[tuple[int, ...]]:
    """Of all arrays of a program, in order, those in its kernels included, without lowering them."""
    text = str(jax.make_jaxpr(function)(*arguments))
    return [tuple(map(int, dims.split(","))) for dims in re.findall(r"(?:\d|bool)\[([\d,]+)\]", text)]


@contextmanager
def _watched() -> Iterator[list[gpu_callbacks.GPURaceDetectionState]]:
    """Collects the detector of every kernel that runs: each kernel makes its own."""
    states, original = [], gpu_callbacks.GPURaceDetectionState

    def make(*arguments, **options):
        states.append(original(*arguments, **options))
        return states[-1]

    gpu_callbacks.GPURaceDetectionState = make  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield states
    finally:
        gpu_callbacks.GPURaceDetectionState = original

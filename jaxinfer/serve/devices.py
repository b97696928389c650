"""Which of the machine's GPUs each replica of the engine has, found without JAX."""

from __future__ import annotations

import ctypes
import os
from importlib.util import find_spec

VISIBLE = "CUDA_VISIBLE_DEVICES"


def shares(
    data_parallel_size: int, tensor_parallel_size: int, pipeline_parallel_size: int = 1, context_parallel_size: int = 1
) -> list[str | None]:
    """What `CUDA_VISIBLE_DEVICES` is for each replica.

    None leaves it as it is: for a replica that has no others beside it, and where JAX runs on a CPU, on which every
    process has devices of its own.

    Raises:
        ValueError: there are fewer GPUs than the replicas need.
    """
    gpus = visible_gpus() if data_parallel_size > 1 else []
    if not gpus:
        return [None] * data_parallel_size
    own = tensor_parallel_size * pipeline_parallel_size * context_parallel_size
    needed, fitting = data_parallel_size * own, len(gpus) // own
    if needed > len(gpus):
        others = {"pipeline_parallel_size": pipeline_parallel_size, "context_parallel_size": context_parallel_size}
        shared = "".join(f" and {name} = {size}" for name, size in others.items() if size > 1)
        raise ValueError(
            f"data_parallel_size = {data_parallel_size} replicas with tensor_parallel_size = {tensor_parallel_size}"
            f"{shared} need {needed} GPUs, and there are {len(gpus)}; replicas that would fit: {fitting}"
        )
    return [",".join(gpus[first : first + own]) for first in range(0, needed, own)]


def visible_gpus() -> list[str]:
    """The GPUs that JAX would find in a process started now, as `CUDA_VISIBLE_DEVICES` names them; none where it would
    run on something else."""
    first = os.environ.get("JAX_PLATFORMS", "").partition(",")[0]
    if first not in ("", "cuda", "gpu") or find_spec("jax_cuda13_plugin") is None:
        return []
    count = count_gpus()
    given = os.environ.get(VISIBLE)
    names = [str(index) for index in range(count)] if given is None else given.split(",")
    return [name.strip() for name in names[:count]]


def count_gpus() -> int:
    """How many GPUs the driver lets this process see; 0 without a driver. Takes no memory of them."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value

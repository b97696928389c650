"""Every test runs strictly: dtypes and ranks are explicit, warnings are errors, and there are 8 virtual devices."""

import os
from importlib.util import find_spec

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
if find_spec("jax_cuda13_plugin") is None:
    # Small problems take longer to compile than to run. These flags leave XLA's own passes, and so its HLO, alone.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two test processes share a GPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(items):
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)

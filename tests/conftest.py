"""Every test runs strictly: dtypes and ranks are explicit, warnings are errors, and there are 8 virtual devices."""

import gc
import os
import sys
from importlib.util import find_spec
from tempfile import TemporaryDirectory

import pytest

from tests import shape_checks

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
if find_spec("jax_cuda13_plugin") is None:
    # Small problems take longer to compile than to run. Of XLA's own passes only the one is left out that makes two
    # kernels of a long sum: it has no part in what the tests read in compiled HLO, which is copies and collectives.
    # The older emitters of JAX 0.11's XLA give LLVM the same fusions in a quarter of the time; the new ones make a
    # compiler for each. In JAX 0.12 there are no older ones, and the option is ignored.
    os.environ["XLA_FLAGS"] += (
        " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        " --xla_disable_hlo_passes=tree_reduction_rewriter --xla_cpu_parallel_codegen_split_count=1"
        " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true"
    )
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two test processes share a GPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What a program was traced from line by line is kept beside each operation, of which no test reads more than its name.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a test depends on no earlier one, and leaves nothing behind

shape_checks.install()

# These modules ask one engine, whose programs take long to compile (`tests.engine.tiny.warm_llm`).
WARM_ENGINE = (
    "tests/engine/test_warm_up.py", "tests/engine/test_batch_invariance.py", "tests/engine/test_failure.py",
    "tests/engine/test_sharing.py", "tests/test_llm.py", "tests/test_bad_input.py", "tests/test_structured.py",
    "tests/benchmarks/test_serving.py", "tests/serve/test_batch.py", "tests/engine/test_speculation.py",
    "tests/engine/test_adaptive.py", "tests/engine/test_medusa.py", "tests/engine/test_eagle.py",
    "tests/benchmarks/test_replay.py",
)  # fmt: skip
# These ask one server, which the last of them ends; the one before compares it with two replicas.
SERVER = (
    "tests/serve/test_answers.py", "tests/serve/test_structured.py", "tests/serve/test_refusals.py",
    "tests/serve/test_hang_ups.py", "tests/serve/test_metrics.py", "tests/serve/test_page.py",
    "tests/serve/test_online.py", "tests/serve/test_replicas.py", "tests/serve/test_sigterm.py",
)  # fmt: skip
# What runs longest comes first, so that no process is left alone with it at the end.
FIRST = (
    *WARM_ENGINE,
    "tests/hosts/test_two_processes.py",
    "tests/model/test_parity.py",
    "tests/pallas_kernels/test_sanitizer.py",
    *SERVER,
    "tests/serve/test_ends.py",
    "tests/test_draft.py",
    "tests/test_notebooks.py",
    "tests/training/test_heads.py",
)


def pytest_configure(config):
    if sys.dont_write_bytecode:
        _share_bytecode(config)
    if config.getoption("dist") != "no" and not hasattr(config, "workerinput"):
        return  # this process hands the tests out and runs none
    import jax
    from hypothesis import settings

    settings.register_profile("tests", deadline=None)  # a busy machine is no failure
    settings.load_profile("tests")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_default_matmul_precision", "highest")


def _share_bytecode(config):
    """Tests start many processes that import the same packages: where Python is to leave no bytecode beside these, all
    processes have a folder of it until the tests end."""
    folder = TemporaryDirectory(prefix="bytecode-", ignore_cleanup_errors=True)
    config.add_cleanup(folder.cleanup)
    os.environ |= {"PYTHONPYCACHEPREFIX": folder.name, "PYTHONDONTWRITEBYTECODE": ""}
    sys.pycache_prefix, sys.dont_write_bytecode = folder.name, False


def pytest_collection_modifyitems(items):
    import jax

    for item in items:
        if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
    order = {module: place for place, module in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(_module(item.nodeid), len(order)))
    # What the imports made lives as long as the process: the collector need not look at it again and again.
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def pytest_xdist_make_scheduler(config, log):
    """A module runs in one process, and so do those that share an engine or a server: what they compile is compiled
    once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            module = _module(nodeid)
            return next((group[0] for group in (WARM_ENGINE, SERVER) if module in group), module)

    return ByModule(config, log)


def _module(nodeid):
    return nodeid.split("::")[0]

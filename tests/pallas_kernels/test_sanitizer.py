"""compute-sanitizer finds no fault in a small launch of any kernel, and does find those that are planted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pallas_kernels.sanitized import KERNELS

SANITIZER = shutil.which("compute-sanitizer")
OURS = "kernel_substring=mosaic_gpu"  # in the name of every kernel of Mosaic GPU
FOUND = 9  # the exit code that the tool is told to give

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed"),
]


def sanitized(tool: str, name: str) -> subprocess.CompletedProcess[str]:
    """Every allocation is one of the driver's own, so that the tool knows its end."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    program = [sys.executable, "-m", "tests.pallas_kernels.sanitized", name]
    options = ["--tool", tool, "--kernel-name", OURS, "--error-exitcode", str(FOUND)]
    return subprocess.run(
        [SANITIZER or "", *options, *program],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_fault_in(tool, name):
    result = sanitized(tool, name)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("tool", "name"), [("memcheck", "out_of_bounds"), ("racecheck", "unordered")])
def test_a_planted_fault_is_found(tool, name):
    result = sanitized(tool, name)
    assert result.returncode == FOUND, result.stdout + result.stderr

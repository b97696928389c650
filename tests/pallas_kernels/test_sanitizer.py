"""compute-sanitizer finds no fault in a small launch of any kernel, and does find those that are planted."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pallas_kernels.sanitized import KERNELS

SANITIZER = shutil.which("compute-sanitizer")
OURS = "kernel_substring=mosaic_gpu"  # in the name of every kernel of Mosaic GPU
FOUND = 9  # the exit code that the tool is told to give
SECONDS = 240  # until a launch counts as hanging

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed"),
]


def sanitized(tool: str, name: str) -> tuple[int, str]:
    """Exit code and output of the tool. Every allocation is one of the driver's own, so that it knows its end."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    program = [sys.executable, "-m", "tests.pallas_kernels.sanitized", name]
    options = ["--tool", tool, "--kernel-name", OURS, "--error-exitcode", str(FOUND)]
    process = subprocess.Popen(
        [SANITIZER or "", *options, *program],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the tool's own child too
    return process.returncode, output


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_fault_in(tool, name):
    code, output = sanitized(tool, name)
    assert code == 0, output


@pytest.mark.parametrize(("tool", "name"), [("memcheck", "out_of_bounds"), ("racecheck", "unordered")])
def test_a_planted_fault_is_found(tool, name):
    code, output = sanitized(tool, name)
    assert code == FOUND, output

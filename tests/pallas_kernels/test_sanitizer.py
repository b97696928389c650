"""compute-sanitizer finds no fault in a small launch of any kernel, and does find those that are planted.

It takes 2026.4 or newer, which is in the group `sanitizer` of pyproject.toml: that of CUDA 13.0 (2025.3) ends with
"failed to handle a hardware exception" in every kernel that copies by TMA under racecheck, and in some under memcheck.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pallas_kernels.sanitized import KERNELS

OLDEST = (2026, 4)

OURS = "kernel_substring=mosaic_gpu"  # in the name of every kernel of Mosaic GPU
FOUND = 9  # the exit code that the tool is told to give
SECONDS = 240  # until a launch counts as hanging

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def sanitizer() -> str:
    """The tool's path: that of the package before that of the system."""
    packages = importlib.util.find_spec("nvidia")
    folders = [str(Path(path) / "cu13" / "bin") for path in (packages and packages.submodule_search_locations) or ()]
    path = shutil.which("compute-sanitizer", path=os.pathsep.join([*folders, os.environ["PATH"]]))
    if path is None:
        pytest.skip("compute-sanitizer is not installed")
    output = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    version = re.search(r"Version (\d+)\.(\d+)", output)
    assert version, output
    if (int(version[1]), int(version[2])) < OLDEST:
        pytest.skip(f"{version[0]} of compute-sanitizer has failures of its own; needed is {OLDEST[0]}.{OLDEST[1]}")
    return path


def sanitized(sanitizer: str, tool: str, name: str) -> tuple[int, str]:
    """Exit code and output of the tool. Every allocation is one of the driver's own, so that it knows its end."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    program = [sys.executable, "-m", "tests.pallas_kernels.sanitized", name]
    options = ["--tool", tool, "--kernel-name", OURS, "--error-exitcode", str(FOUND)]
    process = subprocess.Popen(
        [sanitizer, *options, *program],
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
def test_no_fault_in(sanitizer, tool, name):
    code, output = sanitized(sanitizer, tool, name)
    assert code == 0, output


@pytest.mark.parametrize(("tool", "name"), [("memcheck", "out_of_bounds"), ("racecheck", "unordered")])
def test_a_planted_fault_is_found(sanitizer, tool, name):
    code, output = sanitized(sanitizer, tool, name)
    assert code == FOUND, output

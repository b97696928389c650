"""Loads a checkpoint and prints by how many bytes the process's resident memory grew at its peak.

    python -m tests.checkpoint.measure_load FOLDER DEVICES ...

One line for each number of devices: that growth, and the bytes of the parameters. Resident memory is the kernel's own
high-water mark (VmHWM): the arrays themselves, which live in host memory on CPU devices, buffers, and mapped pages of
files. Pages in the kernel's file cache belong to no process and do not count.
"""

import os
import re
import sys
import warnings
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("XLA_FLAGS", None)

import jax

from jaxinfer import checkpoint
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh


def resident(field: str) -> int:
    """Bytes; `field` is VmRSS, now, or VmHWM, the most so far."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def measure(folder: Path, devices: int) -> None:
    jax.config.update("jax_num_cpu_devices", devices)
    model = Model(read_config(folder), make_mesh(tensor=devices))
    before = resident("VmRSS")
    arrays = checkpoint.load(folder, model)
    print(resident("VmHWM") - before, sum(array.nbytes for array in arrays.values()), flush=True)


def main() -> None:
    """Each load has a process of its own, since memory that one gave back could serve the next. They share the
    imports, which take longer than a load; no thread of JAX runs before its first device is asked for."""
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
    for devices in map(int, sys.argv[2:]):
        if (child := os.fork()) == 0:
            measure(Path(sys.argv[1]), devices)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(1)


main()

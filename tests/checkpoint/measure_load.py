"""Loads a checkpoint and prints by how many bytes the process's resident memory grew at its peak.

    python measure_load.py FOLDER DEVICES

Resident memory is the kernel's own high-water mark (VmHWM): the arrays themselves, which live in host memory on CPU
devices, buffers, and mapped pages of files. Pages in the kernel's file cache belong to no process and do not count.
"""

import os
import re
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={sys.argv[2]}"
os.environ["JAX_PLATFORMS"] = "cpu"

from jaxinfer import checkpoint
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh


def resident(field: str) -> int:
    """Bytes; `field` is VmRSS, now, or VmHWM, the most so far."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def main() -> None:
    folder = Path(sys.argv[1])
    model = Model(read_config(folder), make_mesh(tensor=int(sys.argv[2])))
    before = resident("VmRSS")
    arrays = checkpoint.load(folder, model)
    print(resident("VmHWM") - before, sum(array.nbytes for array in arrays.values()))


main()

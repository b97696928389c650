from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.golden.load import load
from tests.golden.weights import write_checkpoint


@pytest.fixture
def publish(tmp_path) -> Callable[[str], Path]:
    """Writes a golden model as it would be published, and gives its folder."""

    def write(case: str) -> Path:
        folder = tmp_path / case
        folder.mkdir()
        write_checkpoint(folder, load(case))
        return folder

    return write


@pytest.fixture
def damage() -> Callable[[Path, np.ndarray], Path]:
    """Overwrites 64 bytes with 0xff in the middle of where a file under a folder stores an array; gives the file."""

    def overwrite(folder: Path, array: np.ndarray) -> Path:
        stored = array.tobytes()
        for file in folder.rglob("*"):
            content = bytearray(file.read_bytes() if file.is_file() else b"")
            if (begin := content.find(stored)) >= 0:
                middle = begin + len(stored) // 8 * 4
                content[middle : middle + 64] = b"\xff" * 64
                file.write_bytes(content)
                return file
        raise AssertionError(f"no file under {folder} stores the array")

    return overwrite

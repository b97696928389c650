from collections.abc import Callable
from pathlib import Path

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

"""Programs of two calls instead of twenty: they compile in a tenth of the time, and are no different otherwise."""

import pytest

from benchmarks.kernels import timing


@pytest.fixture
def short_programs(monkeypatch):
    monkeypatch.setattr(timing, "CALLS", 2)

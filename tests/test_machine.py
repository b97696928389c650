import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from jaxinfer import machine
from jaxinfer.machine import device_memory, host_memory, known_machine, measure_machine
from jaxinfer.roofline import DATASHEETS, MEASURED


def test_a_measured_machine_has_plausible_ceilings():
    machine = measure_machine()
    assert 1e8 < machine.bandwidth < 1e13  # slower than a disk or faster than any memory is a wrong unit
    assert 1e8 < machine.rate("bf16") < 1e16
    assert 1e8 < machine.rate("fp32") < 1e16
    assert 0 < machine.overhead < 1e-2
    assert machine.memory > 2**30


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        ("NVIDIA H200", "bf16", MEASURED["h200-measured"]),
        ("NVIDIA H100 80GB HBM3", "fp16", MEASURED["h100-measured"]),
        ("NVIDIA L4", "bf16", DATASHEETS["l4"]),
        ("Tesla T4", "fp16", DATASHEETS["t4"]),
        ("Tesla T4", "bf16", DATASHEETS["l4"]),  # has none: measured
        ("cpu", "fp32", DATASHEETS["l4"]),
    ],
)
def test_times_are_predicted_by_the_table_or_by_what_is_measured(monkeypatch, kind, dtype, expected):
    monkeypatch.setattr(machine.jax, "local_devices", lambda: [SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr(machine, "measure_machine", lambda: DATASHEETS["l4"])
    machine._measured_once.cache_clear()
    assert known_machine(dtype) == expected
    machine._measured_once.cache_clear()


def test_a_machine_is_measured_once_and_said_so(caplog, monkeypatch):
    measured = []
    monkeypatch.setattr(machine, "measure_machine", lambda: measured.append(DATASHEETS["l4"]) or measured[-1])
    machine._measured_once.cache_clear()
    machine._log_once.cache_clear()
    with caplog.at_level("INFO", "jaxinfer.machine"):
        assert known_machine("fp32") is known_machine("fp32")
    assert len(measured) == len(caplog.records) == 1
    machine._measured_once.cache_clear()
    assert "predicted by what was measured now" in caplog.records[0].getMessage()


@pytest.mark.parametrize("stats", [None, {"bytes_in_use": 5}])
def test_memory_is_the_allocators_limit_or_the_hosts(stats):
    assert device_memory({"bytes_limit": 123}) == 123
    assert device_memory(stats) == host_memory() > 2**30


PROGRAM = """
from collections import Counter
import jax
from jaxinfer.machine import keep_compiled

events = Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
keep_compiled()
jax.jit(lambda x: x + 1)(1.0)
print(events["cache_hits"], events["cache_misses"])
"""


def test_a_second_process_compiles_nothing_again(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    command = [sys.executable, "-c", PROGRAM]
    first, second = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    )
    assert first == ["0", "1"]
    assert second == ["1", "0"]
    assert any((tmp_path / "jaxinfer" / "compiled").iterdir())

import pytest

from jaxinfer.machine import device_memory, host_memory, measure_machine


def test_a_measured_machine_has_plausible_ceilings():
    machine = measure_machine()
    assert 1e8 < machine.bandwidth < 1e13  # slower than a disk or faster than any memory is a wrong unit
    assert 1e8 < machine.rate("bf16") < 1e16
    assert 1e8 < machine.rate("fp32") < 1e16
    assert 0 < machine.overhead < 1e-2
    assert machine.memory > 2**30


@pytest.mark.parametrize("stats", [None, {"bytes_in_use": 5}])
def test_memory_is_the_allocators_limit_or_the_hosts(stats):
    assert device_memory({"bytes_limit": 123}) == 123
    assert device_memory(stats) == host_memory() > 2**30

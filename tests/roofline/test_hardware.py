import pytest

from jaxinfer.roofline.hardware import DATASHEETS, MEASURED, find_by_device, find_hardware


def test_an_a100_balances_at_153_flop_per_byte():
    assert DATASHEETS["a100-80"].balance() == pytest.approx(153, abs=0.5)


@pytest.mark.parametrize("name", DATASHEETS)
def test_an_entry_is_consistent(name):
    hardware = DATASHEETS[name]
    widths = [dtype for dtype in ("fp32", "fp16", "bf16", "fp8", "int8", "int4") if dtype in hardware.flops]
    rates = [hardware.flops[dtype] for dtype in widths]
    assert rates == sorted(rates)  # narrower operands are never slower
    assert hardware.pcie <= hardware.interconnect < hardware.bandwidth
    assert hardware.l2 + hardware.shared_memory < hardware.memory / 40
    assert 0.015 < hardware.memory / hardware.bandwidth < 0.1  # seconds to read all of it


@pytest.mark.parametrize("name", MEASURED)
def test_measured_ceilings_lie_below_the_datasheet(name):
    measured = find_hardware(name)
    datasheet = DATASHEETS[name.removesuffix("-measured")]
    assert 0.5 < measured.bandwidth / datasheet.bandwidth < 1
    assert measured.flops.keys() == datasheet.flops.keys()
    assert all(0.5 < measured.flops[dtype] / peak < 1 for dtype, peak in datasheet.flops.items())


def test_an_unmeasured_dtype_keeps_the_fraction_of_the_measured_one():
    measured = DATASHEETS["h100"].with_ceilings(3e12, {"bf16": 989e12 / 2})
    assert measured.rate("fp8") == pytest.approx(1979e12 / 2)
    assert measured.bandwidth == 3e12


def test_a_dtype_that_only_the_measurement_knows_is_added():
    measured = DATASHEETS["t4"].with_ceilings(3e11, {"bf16": 4e12, "fp16": 65e12 / 4})
    assert measured.rate("bf16") == 4e12
    assert measured.rate("int8") == pytest.approx(130e12 / 4)


@pytest.mark.parametrize("table", [DATASHEETS, MEASURED], ids=["datasheets", "measured"])
def test_an_entry_is_found_by_its_name_and_by_its_device(table):
    for name, hardware in table.items():
        assert find_hardware(name) is hardware
        assert hardware.name == name
        assert find_by_device(hardware.device_kind, table) is hardware
    assert find_by_device("cpu", table) is None


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"hardware is 'h300'; expected one of a100-40, .*h200-measured"):
        find_hardware("h300")
    with pytest.raises(ValueError, match="t4 has no bf16 matmul; it has fp16, int8, int4, fp32"):
        DATASHEETS["t4"].rate("bf16")

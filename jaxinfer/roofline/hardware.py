"""The machines that a model is planned for: what their makers state, and what was measured on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

GIB = 2**30
MIB = 2**20
KIB = 2**10


@dataclass(frozen=True)
class Messages:
    """Seconds that a collective takes beside those of its bytes. A datasheet states none."""

    latency: float = 0.0  # of any but these:
    small_sum: float = 0.0  # of an all-reduce that is one launch of our kernel
    small: float = 0.0  # bytes of the largest array that it adds up; 0 where it does not run

    def each(self, summed: float | None) -> float:
        """Seconds of one.

        Args:
            summed: bytes of the array that is added up over devices; None of what is no all-reduce.
        """
        return self.latency if summed is None or summed > self.small else self.small_sum


@dataclass(frozen=True)
class Hardware:
    """One device and its links. Rates are per second; sizes and rates of data are in bytes."""

    name: str
    device_kind: str  # as JAX names the device
    flops: Mapping[str, float]  # dense matmul FLOP/s by dtype of the operands
    bandwidth: float  # of the device's memory
    memory: float  # that a program sees, which is less than the name on the box
    l2: float  # 0 where there is none
    shared_memory: float  # per SM; on a TPU the vector memory of a core
    pcie: float  # to the host, one direction
    interconnect: float  # out of the device to its peers, all links, one direction
    overhead: float = 0.0  # seconds to start, fill and drain one kernel; a datasheet states none
    messages: Messages = Messages()
    peers: int = 8  # devices that the interconnect joins: those of one host, or a TPU's pod

    def rate(self, dtype: str) -> float:
        """Dense matmul FLOP/s with operands of `dtype`.

        Raises:
            ValueError: the device has no such matmul.
        """
        if dtype not in self.flops:
            raise ValueError(f"{self.name} has no {dtype} matmul; it has {', '.join(self.flops)}")
        return self.flops[dtype]

    def balance(self, dtype: str = "bf16") -> float:
        """FLOP per byte of memory traffic above which a computation is bound by arithmetic."""
        return self.rate(dtype) / self.bandwidth

    def with_ceilings(
        self, bandwidth: float, flops: Mapping[str, float], overhead: float = 0.0, messages: Messages | None = None
    ) -> Hardware:
        """This device with measured ceilings in the place of its datasheet's.

        A dtype that was not measured keeps the fraction of its peak that the first measured one reached.
        """
        reached = next((flops[dtype] / peak for dtype, peak in self.flops.items() if dtype in flops), 1.0)
        measured = {dtype: peak * reached for dtype, peak in self.flops.items()} | dict(flops)
        return replace(
            self,
            name=f"{self.name}-measured",
            flops=measured,
            bandwidth=bandwidth,
            overhead=overhead,
            messages=messages or self.messages,
        )


# NVIDIA A100 datasheet (June 2021), SXM4 cards; NVLink 3, 600 GB/s both directions.
_A100_FLOPS = {"bf16": 312e12, "fp16": 312e12, "int8": 624e12, "int4": 1248e12, "fp32": 19.5e12}
# NVIDIA H100 and H200 datasheets, SXM5 cards, without sparsity; NVLink 4, 900 GB/s both directions.
_HOPPER_FLOPS = {"bf16": 989e12, "fp16": 989e12, "fp8": 1979e12, "int8": 1979e12, "fp32": 67e12}

_A100_40 = Hardware(
    name="a100-40",
    device_kind="NVIDIA A100-SXM4-40GB",
    flops=_A100_FLOPS,
    bandwidth=1.555e12,
    memory=39.4 * GIB,
    l2=40 * MIB,
    shared_memory=164 * KIB,
    pcie=32e9,
    interconnect=300e9,
)
_A100_80 = replace(
    _A100_40, name="a100-80", device_kind="NVIDIA A100-SXM4-80GB", bandwidth=2.039e12, memory=79.2 * GIB
)
_H100 = Hardware(
    name="h100",
    device_kind="NVIDIA H100 80GB HBM3",
    flops=_HOPPER_FLOPS,
    bandwidth=3.35e12,
    memory=79.1 * GIB,
    l2=50 * MIB,
    shared_memory=228 * KIB,
    pcie=64e9,
    interconnect=450e9,
)
_H200 = replace(_H100, name="h200", device_kind="NVIDIA H200", bandwidth=4.8e12, memory=139.8 * GIB)
# NVIDIA HGX B200 datasheet, per GPU, without sparsity; NVLink 5, 1.8 TB/s both directions.
_B200 = Hardware(
    name="b200",
    device_kind="NVIDIA B200",
    flops={"bf16": 2250e12, "fp16": 2250e12, "fp8": 4500e12, "int8": 4500e12, "fp32": 75e12},
    bandwidth=7.7e12,
    memory=178.3 * GIB,
    l2=126 * MIB,
    shared_memory=228 * KIB,
    pcie=64e9,
    interconnect=900e9,
)
# NVIDIA L4 datasheet, half of the figures that it states with sparsity; peers are reached over PCIe 4.
_L4 = Hardware(
    name="l4",
    device_kind="NVIDIA L4",
    flops={"bf16": 121e12, "fp16": 121e12, "fp8": 242e12, "int8": 242e12, "fp32": 30.3e12},
    bandwidth=300e9,
    memory=22.0 * GIB,
    l2=48 * MIB,
    shared_memory=100 * KIB,
    pcie=32e9,
    interconnect=32e9,
)
# NVIDIA T4 datasheet; Turing's tensor cores know fp16 and integers only. Peers are reached over PCIe 3.
_T4 = Hardware(
    name="t4",
    device_kind="Tesla T4",
    flops={"fp16": 65e12, "int8": 130e12, "int4": 260e12, "fp32": 8.1e12},
    bandwidth=320e9,
    memory=14.6 * GIB,
    l2=4 * MIB,
    shared_memory=64 * KIB,
    pcie=16e9,
    interconnect=16e9,
)
# NVIDIA Ada architecture whitepaper, table of the RTX 4090, with float32 accumulation and without sparsity.
_RTX_4090 = Hardware(
    name="rtx-4090",
    device_kind="NVIDIA GeForce RTX 4090",
    flops={"bf16": 165.2e12, "fp16": 165.2e12, "fp8": 330.3e12, "int8": 660.6e12, "fp32": 82.6e12},
    bandwidth=1.008e12,
    memory=23.6 * GIB,
    l2=72 * MIB,
    shared_memory=100 * KIB,
    pcie=32e9,
    interconnect=32e9,
)
# Jouppi et al. 2023, "TPU v4", table 4: the common memory of 128 MiB stands under `l2`; six links of 45 GB/s.
_TPU_V4 = Hardware(
    name="tpu-v4",
    device_kind="TPU v4",
    flops={"bf16": 275e12, "int8": 275e12},
    bandwidth=1.2288e12,
    memory=30.75 * GIB,
    l2=128 * MIB,
    shared_memory=16 * MIB,
    pcie=16e9,
    interconnect=270e9,
    peers=4096,
)
# Google Cloud documentation of TPU v5e; four links of 45 GB/s.
_TPU_V5E = Hardware(
    name="tpu-v5e",
    device_kind="TPU v5 lite",
    flops={"bf16": 197e12, "int8": 394e12},
    bandwidth=819e9,
    memory=15.75 * GIB,
    l2=0,
    shared_memory=128 * MIB,
    pcie=16e9,
    interconnect=180e9,
    peers=256,
)

DATASHEETS = {
    hardware.name: hardware
    for hardware in (_A100_40, _A100_80, _H100, _H200, _B200, _L4, _T4, _RTX_4090, _TPU_V4, _TPU_V5E)
}

# Measured once; all figures of a card are set against its entry, so that they compare with each other.
# H200: reading 4.3 GB by a sum, a bf16 matmul of 8192^3, kernels that follow one another. Between two devices, an XLA
# all-reduce of 8 KB; and by our kernel, what a step of Llama-3-8B took for each of its 65 all-reduces of 8 or 128 KB
# (11 and 14 us) beyond what is predicted of the rest.
# H100: the same sum and matmul, the best of three cards (3.07, 3.08 and 3.12 TB/s); the messages are the H200's.
_MESSAGES = Messages(latency=27e-6, small_sum=12.5e-6, small=128 * KIB)
MEASURED = {
    "h200-measured": _H200.with_ceilings(4.54e12, {"bf16": 746e12}, 1.9e-6, _MESSAGES),
    "h100-measured": _H100.with_ceilings(3.12e12, {"bf16": 780e12}, 2.65e-6, _MESSAGES),
}


def find_hardware(name: str) -> Hardware:
    """The entry of that name, from a datasheet or measured.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    table = DATASHEETS | MEASURED
    if name.lower() not in table:
        raise ValueError(f"hardware is {name!r}; expected one of {', '.join(table)}")
    return table[name.lower()]


def find_by_device(device_kind: str, table: Mapping[str, Hardware] = DATASHEETS) -> Hardware | None:
    """The entry of `table` for a device, by the name that JAX gives it; None where there is none."""
    return next((hardware for hardware in table.values() if hardware.device_kind == device_kind), None)

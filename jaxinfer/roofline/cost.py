"""What a step of inference costs on one device, and the shortest time that a machine can take for it.

The roofline (Williams, Waterman and Patterson 2009): a computation of F FLOPs that moves Q bytes takes at least
max(F / peak, Q / bandwidth) seconds. A step is a row of computations, one after the other, each with a bound of its
own. What devices send each other can pass meanwhile, even where a computation needs it, for both can be cut in pieces
(Wang et al. 2023, "Overlap communication with dependent computation via decomposition"). So the limit of a step is the
sum over its computations, or the time on the links if that is longer.

The prediction adds what the limit leaves out. Kernels and messages take a constant each, and what is sent hides under
nothing but its own part. And a computation that keeps two resources busy for about as long as each other takes longer
than the busier one alone: a tile is loaded before it is multiplied, and waves of tiles do not divide evenly. It takes
between max(a, b) and a + b seconds; the root of a^2 + b^2 is what an H200 measured, within a fifth from 1 to 256
sequences, where the matmuls go from one bound to the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxinfer.roofline.hardware import Hardware

RESOURCES = ("compute", "memory", "interconnect")


@dataclass(frozen=True)
class Work:
    """One part of a step, on one device."""

    flops: float = 0.0
    wasted: float = 0.0  # time on the matmul units that is spent beside those, as FLOPs
    weights: float = 0.0  # bytes of weights that are read
    cache: float = 0.0  # bytes of keys and values that are read and written
    activations: float = 0.0  # bytes of the residual stream that are read and written
    sent: float = 0.0  # bytes to other devices
    dtype: str = "bf16"  # operands of its matmuls
    kernels: int = 0
    messages: int = 0  # collectives
    summed: float | None = None  # bytes of the array that each of them adds up over devices, if they are all-reduces

    @property
    def bytes(self) -> float:
        """Traffic with the device's own memory."""
        return self.weights + self.cache + self.activations

    @property
    def intensity(self) -> float:
        """FLOP per byte of memory traffic; 0 for work that is all communication."""
        return self.flops / self.bytes if self.bytes else 0.0

    def times(self, hardware: Hardware) -> dict[str, float]:
        """Seconds that each resource is busy.

        Raises:
            ValueError: there are FLOPs, and the device has no matmul of `dtype`.
        """
        return {
            "compute": self.flops / hardware.rate(self.dtype) if self.flops else 0.0,
            "memory": self.bytes / hardware.bandwidth,
            "interconnect": self.sent / hardware.interconnect,
        }

    def limit(self, hardware: Hardware) -> float:
        """Seconds at the least: those of the busiest resource."""
        return max(self.times(hardware).values())

    def own_limit(self, hardware: Hardware) -> float:
        """Seconds at the least of what the device does itself, whatever it sends."""
        times = self.times(hardware)
        return max(times["compute"], times["memory"])

    def expected(self, hardware: Hardware) -> float:
        """Seconds that it is expected to take, its kernels' and messages' constants included."""
        constants = self.kernels * hardware.overhead + self.waiting(hardware)
        busy = self.times(hardware)
        if self.wasted:
            busy["compute"] += self.wasted / hardware.rate(self.dtype)
        return math.hypot(*busy.values()) + constants

    def waiting(self, hardware: Hardware) -> float:
        """Seconds that its messages take beside those of their bytes."""
        return self.messages * hardware.messages.each(self.summed)

    def bound(self, hardware: Hardware) -> str:
        """The busiest resource, one of `RESOURCES`."""
        times = self.times(hardware)
        return max(RESOURCES, key=times.__getitem__)


@dataclass(frozen=True)
class Cost:
    """A step as its parts, by name, and the tokens that it yields (decoding) or reads (prefill)."""

    parts: Mapping[str, Work]
    tokens: int

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.parts.values())

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts.values())

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes

    def times(self, hardware: Hardware) -> dict[str, float]:
        """Seconds that each resource is busy over the whole step."""
        parts = [part.times(hardware) for part in self.parts.values()]
        return {resource: sum(times[resource] for times in parts) for resource in RESOURCES}

    def bound(self, hardware: Hardware) -> str:
        """What sets the limit, one of `RESOURCES`: the links, or what else is busiest over the whole step."""
        times = self.times(hardware)
        if times["interconnect"] > self.own_limit(hardware):
            return "interconnect"
        return max(("compute", "memory"), key=times.__getitem__)

    def limit(self, hardware: Hardware) -> float:
        """Seconds that the step takes at the least."""
        return max(self.own_limit(hardware), self.times(hardware)["interconnect"])

    def own_limit(self, hardware: Hardware) -> float:
        """Seconds at the least of what the device does itself, whatever it sends."""
        return sum(part.own_limit(hardware) for part in self.parts.values())

    def predict(self, hardware: Hardware) -> float:
        """Seconds that the step is expected to take. A datasheet states no constants of kernels and messages."""
        return sum(part.expected(hardware) for part in self.parts.values())

    def only(self, *names: str) -> Cost:
        """Those of the parts that it has."""
        return Cost({name: part for name, part in self.parts.items() if name in names}, self.tokens)

    def without(self, *names: str) -> Cost:
        """All other parts."""
        return Cost({name: part for name, part in self.parts.items() if name not in names}, self.tokens)

    def fraction(self, hardware: Hardware, seconds: float) -> float:
        """How much of the machine a step that took `seconds` used: 1 is the limit.

        Raises:
            ValueError: `seconds` is not positive.
        """
        if seconds <= 0:
            raise ValueError(f"seconds is {seconds}; a measured time is above 0")
        return self.limit(hardware) / seconds

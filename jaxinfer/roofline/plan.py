"""A model on a machine and a mesh: what it holds there, what its steps cost, and the best mesh for a goal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jaxinfer.roofline.attention import Attention
from jaxinfer.roofline.hardware import Hardware
from jaxinfer.roofline.memory import MemoryPlan, plan_memory
from jaxinfer.roofline.mesh import ONE, Experts, Mesh, Share, check_mesh, meshes, ways_to_experts
from jaxinfer.roofline.pipeline import Pipeline, decode_on, prefill_on
from jaxinfer.roofline.precision import BF16, BITS, Precision
from jaxinfer.roofline.step import compute_bound_batch

if TYPE_CHECKING:
    from jaxinfer.model.config import ModelConfig

Goal = Literal["latency", "throughput"]


@dataclass(frozen=True)
class Plan:
    """Decoding of `batch` sequences on `mesh`, and the prefill of one prompt as long as each of them.

    Attributes:
        memory: of one device, for the sequences of its replica.
        decode, prefill: of one replica.
    """

    config: ModelConfig
    hardware: Hardware
    precision: Precision
    attention: Attention
    mesh: Mesh
    batch: int
    memory: MemoryPlan
    decode: Pipeline
    prefill: Pipeline

    @property
    def fastest(self) -> float:
        """Tokens/s of all replicas at the most."""
        return self.batch / self.decode.limit(self.hardware)

    @property
    def expected(self) -> float:
        """Tokens/s of all replicas as they are predicted."""
        return self.batch / self.decode.predict(self.hardware)

    def turning_point(self, context: int) -> int | None:
        """The smallest micro-batch whose decoding at this context is bound by compute."""
        return compute_bound_batch(
            self.config, context, self.hardware, self.precision, self.mesh.tensor, self.attention,
            Share(self.mesh.context),
        )  # fmt: skip


def make_plan(
    config: ModelConfig, hardware: Hardware, batch: int, context: int, precision: Precision = BF16,
    mesh: Mesh = ONE, attention: Attention = "flash", microbatches: int | None = None,
) -> Plan:  # fmt: skip
    """Plans decoding and prefill, which is one step of all of a prompt. Experts on several devices are reached in the
    way that is predicted to be quicker; all-to-all is built where these are all devices of a replica.

    Args:
        batch: sequences of all replicas together.
        microbatches: that those of one replica are split into; by default as the engine does it.

    Raises:
        ValueError: a count is out of its range, the model does not spread over the mesh, or the machine has no matmul
            of a dtype that is needed; the message says which options give one that it has.
    """
    _check_matmuls(hardware, precision)
    if context > config.context:
        raise ValueError(f"context is {context}; the model was made for at most {config.context}")
    check_mesh(config, mesh)
    if (devices := mesh.devices // mesh.replicas) > hardware.peers:
        raise ValueError(
            f"a replica has {devices} devices; {hardware.name} joins {hardware.peers} by its interconnect, and slower "
            "networks are not planned"
        )

    def quickest(make: Callable[[Experts], Pipeline]) -> Pipeline:
        steps = (make(experts) for experts in ways_to_experts(config, mesh))
        return min(steps, key=lambda step: step.predict(hardware))

    decode = quickest(lambda e: decode_on(config, mesh, batch, context, precision, attention, e, microbatches))
    memory = plan_memory(
        config, hardware, decode.tokens, context, precision, mesh.tensor,
        pipeline_parallel=mesh.pipe, context_parallel=mesh.context,
    )  # fmt: skip
    prefill = quickest(lambda e: prefill_on(config, mesh, context, precision, attention, e))
    return Plan(config, hardware, precision, attention, mesh, batch, memory, decode, prefill)


@dataclass(frozen=True)
class Proposal:
    """Every mesh of some devices.

    Attributes:
        plans: of those that the model spreads over and fits, the best for the goal first.
        too_large: of those whose memory it does not fit.
        refused: all others, by what is wrong with them.
    """

    plans: list[Plan]
    too_large: list[Plan]
    refused: dict[str, list[Mesh]]


def propose(
    config: ModelConfig, hardware: Hardware, devices: int, goal: Goal, context: int,
    precision: Precision = BF16, batch: int | None = None, attention: Attention = "flash",
) -> Proposal:  # fmt: skip
    """Plans every mesh of `devices` that an engine can run on and sorts those that fit: for latency by the predicted
    time of a decode step, then by that to the first token; for throughput by the predicted tokens/s of decoding.

    Args:
        batch: sequences of all replicas together. None is one for latency; for throughput as many as fit, in each
            replica a power of two, as engines have them.

    Raises:
        ValueError: as `make_plan`, where that holds for every mesh.
    """
    if devices < 1:
        raise ValueError(f"devices is {devices}; it must be at least 1")
    tried, not_built = [], []
    for mesh in meshes(devices):
        (not_built if mesh.pipe > 1 and mesh.context > 1 else tried).append(mesh)
    plans, too_large, refused = [], [], {}
    for mesh in tried:
        try:
            count = batch or (1 if goal == "latency" else _most_sequences(config, hardware, context, precision, mesh))
            plan = make_plan(config, hardware, count, context, precision, mesh, attention)
        except ValueError as error:
            refused.setdefault(str(error), []).append(mesh)
        else:
            (plans if plan.memory.fits else too_large).append(plan)
    if not plans and not too_large and len(refused) == 1:
        raise ValueError(next(iter(refused)))
    if not_built:
        refused["engines have no pipe whose stages share sequences"] = not_built
    keys = {
        "latency": lambda plan: (plan.decode.predict(hardware), plan.prefill.predict(hardware)),
        "throughput": lambda plan: (-plan.expected, plan.prefill.predict(hardware)),
    }
    return Proposal(sorted(plans, key=keys[goal]), sorted(too_large, key=_missing), refused)


def _most_sequences(config: ModelConfig, hardware: Hardware, context: int, precision: Precision, mesh: Mesh) -> int:
    """Sequences of all replicas that fit, a power of two in each; one each where none does."""

    def fits(batch: int) -> bool:
        return plan_memory(
            config, hardware, batch, context, precision, mesh.tensor,
            pipeline_parallel=mesh.pipe, context_parallel=mesh.context,
        ).fits  # fmt: skip

    own = 1
    while fits(2 * own):
        own *= 2
    return mesh.replicas * own


def _missing(plan: Plan) -> float:
    """Bytes of a device's memory by which a plan is too large."""
    return plan.memory.batch * plan.memory.per_sequence - plan.memory.cache


def _check_matmuls(hardware: Hardware, precision: Precision) -> None:
    for needed in (precision.activations, precision.residual):
        try:
            hardware.rate(needed)
        except ValueError as error:
            other = next(dtype for dtype in hardware.flops if BITS[dtype] >= 16)
            names = [name for name in ("weights", "cache") if getattr(precision, name) == needed]
            options = " ".join(f"--{name} {other}" for name in (*names, "activations"))
            raise ValueError(f"{error}; pass {options}") from None

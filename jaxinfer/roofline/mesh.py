"""How devices share a model: the axes of the mesh, and replicas of the whole beside each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields, replace
from math import prod
from typing import TYPE_CHECKING, Literal

from jaxinfer.roofline.shapes import check_tensor_parallel

if TYPE_CHECKING:
    from jaxinfer.model.config import ModelConfig


Experts = Literal["replicated", "all-to-all"]
"""How tokens come to experts on several devices. "replicated": every device has all tokens and computes its experts'
part of each; an all-reduce adds up. "all-to-all": every device has a part of the tokens between the two halves of that
all-reduce, and sends each to its experts and back, which is less to send where a token has fewer experts than there
are devices."""


@dataclass(frozen=True)
class Mesh:
    """Devices by what they share.

    Attributes:
        pipe: stages of layers.
        tensor: parts of every layer: heads, columns and rows of the MLP, experts, vocabulary.
        context: parts of every sequence.
        replicas: engines with a model each, behind one router.
    """

    pipe: int = 1
    tensor: int = 1
    context: int = 1
    replicas: int = 1

    @property
    def devices(self) -> int:
        return prod(astuple(self))

    def __str__(self) -> str:
        sizes = [f"{field.name} {getattr(self, field.name)}" for field in fields(self)]
        return " x ".join(size for size in sizes if not size.endswith(" 1")) or "one device"


ONE = Mesh()


@dataclass(frozen=True)
class Share:
    """What one device has of a step, beside its part of every layer.

    Attributes:
        ranks: devices that each have a part of every sequence.
        experts: how tokens come to them.
        stages: of the pipe in which its layers are one.
        vocabulary: devices that each have a part of it; None are those that have a part of every layer.
    """

    ranks: int = 1
    experts: Experts = "replicated"
    stages: int = 1
    vocabulary: int | None = None


ALL = Share()


# As callers name the axes.
_OPTIONS = {
    "pipe": "pipeline_parallel", "tensor": "tensor_parallel", "context": "context_parallel",
    "replicas": "data_parallel",
}  # fmt: skip


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Raises ValueError, with axis and sizes to blame, where the model does not spread evenly over the mesh."""
    for axis in fields(mesh):
        if (size := getattr(mesh, axis.name)) < 1:
            raise ValueError(f"{_OPTIONS[axis.name]} is {size}; it must be at least 1")
    if config.num_layers % mesh.pipe:
        raise ValueError(f"pipeline_parallel is {mesh.pipe}; it must divide num_layers {config.num_layers}")
    if other := _unlike(config, mesh.pipe):
        fits = [pipe for pipe in _divisors(config.num_layers) if not _unlike(config, pipe)]
        raise ValueError(
            f"pipeline_parallel is {mesh.pipe}; its stages run one program, but layer {other} is not as layer "
            f"{other % (config.num_layers // mesh.pipe)}; {fits} would fit"
        )
    check_tensor_parallel(config, mesh.tensor)


def _unlike(config: ModelConfig, pipe: int) -> int | None:
    """The first layer that differs from the one in its place in the first stage."""
    depth = config.num_layers // pipe
    return next((index for index, layer in enumerate(config.layers) if layer != config.layers[index % depth]), None)


def stage_of(config: ModelConfig, pipe: int) -> ModelConfig:
    """What each stage of a pipe has of the model's layers: all are alike."""
    return replace(config, layers=config.layers[: config.num_layers // pipe])


def vocabulary_parts(config: ModelConfig, mesh: Mesh) -> int:
    """Devices that each have a part of the vocabulary: those of all stages, or of each where all do not divide it."""
    everywhere = mesh.pipe * mesh.tensor
    return mesh.tensor if config.vocab_size % everywhere else everywhere


def ways_to_experts(config: ModelConfig, mesh: Mesh) -> tuple[Experts, ...]:
    """How tokens can come to them: by an all-to-all where all devices of a replica share every layer."""
    exchanges = 1 < mesh.tensor == mesh.devices // mesh.replicas and any(layer.moe for layer in config.layers)
    return ("replicated", "all-to-all") if exchanges else ("replicated",)


def meshes(devices: int) -> Iterator[Mesh]:
    """Every mesh of so many devices."""
    for pipe in _divisors(devices):
        for tensor in _divisors(devices // pipe):
            for context in _divisors(devices // pipe // tensor):
                yield Mesh(pipe, tensor, context, devices // pipe // tensor // context)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]

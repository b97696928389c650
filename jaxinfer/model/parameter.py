"""How a module declares its parameters: shape, dtype and sharding, no values.

A model is built abstractly first. Its values come from a checkpoint or a random draw, straight into their shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.model.config import ModelConfig
from jaxinfer.parallel import CONTEXT, PIPE, TENSOR
from jaxinfer.parallel.pipeline import staged


@dataclass(frozen=True)
class Shapes:
    """Declares parameters for one config on one mesh.

    Attributes:
        stages: of the pipe that the model's layers are divided among; 1 if every device has all of them.
        staged: whether it declares those of a layer in every stage; see `jaxinfer.parallel.pipeline`.
    """

    config: ModelConfig
    mesh: Mesh
    stages: int = 1
    staged: bool = False

    @property
    def tensor(self) -> int:
        return self.mesh.shape[TENSOR]

    @property
    def kv_slots(self) -> int:
        """KV heads, repeated where the mesh has more devices than the model has KV heads."""
        return _kv_slots(self.config, self.tensor)

    @property
    def queries_per_slot(self) -> int:
        return self.config.num_heads // self.kv_slots

    @property
    def per_stage(self) -> int:
        """Layers that a device has."""
        return self.config.num_layers // self.stages

    @property
    def layer(self) -> Shapes:
        """For a layer: that of the same place in every stage, where there are several."""
        return replace(self, staged=self.stages > 1)

    def param(self, shape: tuple[int, ...], spec: Sequence[str | tuple[str, ...] | None] = ()) -> nnx.Param:
        partition = PartitionSpec(*spec, *(None,) * (len(shape) - len(spec)))
        if self.staged:
            shape, partition = staged(shape, partition, self.stages)
        sharding = NamedSharding(self.mesh, partition)
        return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.dtype(self.config.dtype), sharding=sharding))

    def vocabulary(self, tokens: int, *shape: int) -> nnx.Param:
        """A parameter whose first axis is the vocabulary: over all devices, as what reads it is outside the pipe; only
        over those of each stage, where all do not divide it."""
        everywhere = self.stages > 1 and tokens % (self.stages * self.tensor) == 0
        return self.param((tokens, *shape), ((PIPE, TENSOR) if everywhere else TENSOR,))

    def check(self) -> None:
        """Refuses a mesh that does not divide the model.

        Raises:
            ValueError: names the axis, the sizes, and what would fit.
        """
        tensor = self.tensor
        if bad := _undivided(self.config, tensor):
            fits = [fewer for fewer in range(1, tensor) if not _undivided(self.config, fewer)]
            sizes = ", ".join(bad)
            raise ValueError(f"mesh axis {TENSOR} has {tensor} devices, which does not divide {sizes}; {fits} would")
        if self.stages > 1 and (ranks := self.mesh.shape[CONTEXT]) > 1:
            raise ValueError(
                f"mesh axis {PIPE} has {self.stages} stages and axis {CONTEXT} {ranks} devices; one of them must be 1"
            )
        if self.stages > 1 and (problem := _unpiped(self.config, self.stages)):
            counts = range(1, self.config.num_layers + 1)
            fits = [count for count in counts if not _unpiped(self.config, count)]
            raise ValueError(f"mesh axis {PIPE} has {self.stages} stages, {problem}; {fits} would fit")


def _kv_slots(config: ModelConfig, tensor: int) -> int:
    return max(config.num_kv_heads, tensor)


def _unpiped(config: ModelConfig, stages: int) -> str | None:
    """Why a model's layers cannot be divided among so many stages."""
    if config.num_layers % stages:
        return f"which does not divide num_layers {config.num_layers}"
    each = config.num_layers // stages
    for index in range(each, config.num_layers):
        if config.layers[index] != config.layers[index % each]:
            return f"which run one program, but layer {index} is not as layer {index % each}, of another stage"
    return None


def _undivided(config: ModelConfig, tensor: int) -> list[str]:
    """The sizes, with their names, that do not spread evenly over so many devices."""
    kv_slots = _kv_slots(config, tensor)
    sizes = [("vocab_size", config.vocab_size), ("num_heads", config.num_heads), ("KV heads", kv_slots)]
    if any(layer.moe is None for layer in config.layers):
        sizes.append(("intermediate_size", config.intermediate_size))
    experts = {layer.moe.num_experts for layer in config.layers if layer.moe}
    sizes += [("num_experts", count) for count in sorted(experts)]
    bad = [f"{name} {size}" for name, size in sizes if size % tensor]
    if kv_slots % config.num_kv_heads:
        bad.append(f"num_kv_heads {config.num_kv_heads}")
    return bad

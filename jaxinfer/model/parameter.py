"""How a module declares its parameters: shape, dtype and sharding, no values.

A model is built abstractly first. Its values come from a checkpoint or a random draw, straight into their shards.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.model.config import ModelConfig
from jaxinfer.parallel import TENSOR


@dataclass(frozen=True)
class Shapes:
    """Declares parameters for one config on one mesh."""

    config: ModelConfig
    mesh: Mesh

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

    def param(self, shape: tuple[int, ...], spec: tuple[str | None, ...] = ()) -> nnx.Param:
        sharding = NamedSharding(self.mesh, PartitionSpec(*spec, *(None,) * (len(shape) - len(spec))))
        return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.dtype(self.config.dtype), sharding=sharding))

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


def _kv_slots(config: ModelConfig, tensor: int) -> int:
    return max(config.num_kv_heads, tensor)


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

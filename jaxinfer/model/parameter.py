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
        return max(self.config.num_kv_heads, self.tensor)

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
        config, tensor = self.config, self.tensor
        sizes = {"vocab_size": config.vocab_size, "num_heads": config.num_heads, "KV heads": self.kv_slots}
        if any(layer.moe is None for layer in config.layers):
            sizes["intermediate_size"] = config.intermediate_size
        if experts := {layer.moe.num_experts for layer in config.layers if layer.moe}:
            sizes["num_experts"] = min(experts)
        bad = {name: size for name, size in sizes.items() if size % tensor}
        if self.kv_slots % config.num_kv_heads:
            bad["num_kv_heads"] = config.num_kv_heads
        if bad:
            fits = [n for n in range(1, tensor) if not any(size % n for size in sizes.values())]
            raise ValueError(f"mesh axis {TENSOR} has {tensor} devices, which does not divide {bad}; {fits} would")

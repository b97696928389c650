"""Makes one sharded parameter of stored tensors, on the devices that will hold it.

Every device reads the range of each tensor that its shard is made of and joins its ranges alone, without
communication. Only where a shard is scattered over a tensor (queries, keys and values fused row by row, or KV heads
that the devices repeat) does every device read the whole tensor for a moment and keep its part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.checkpoint import forms, slots
from jaxinfer.checkpoint.forms import Array, Form, Sizes
from jaxinfer.model import ModelConfig


@dataclass(frozen=True)
class Assembly:
    """How one parameter comes about. Equal assemblies share a compiled program, so nothing here names a layer.

    Attributes:
        kind: the end of the parameter's path, such as `attention.qkv_DKgH`.
        shape, dtype, sharding: of the parameter.
        repeats: slots that hold the same KV head.
    """

    sizes: Sizes
    kind: str
    form: Form
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding
    repeats: int

    @classmethod
    def of(cls, config: ModelConfig, path: str, form: Form, leaf: jax.ShapeDtypeStruct) -> Assembly:
        kind = path.split(".", 2)[2] if path.startswith("layers.") else path
        assert isinstance(leaf.sharding, NamedSharding)
        repeats = slots.repeats(kind, leaf.shape, config.num_kv_heads)
        return cls(Sizes.of(config), kind, form, leaf.shape, np.dtype(leaf.dtype), leaf.sharding, repeats)

    @cached_property
    def sources(self) -> list[tuple[int, ...]]:
        """The shapes of the tensors that the parameter is made of."""
        parameter = jax.ShapeDtypeStruct(self.shape, self.dtype)
        return [tensor.shape for tensor in jax.eval_shape(self.split, parameter)]

    def split(self, x: Array) -> tuple[Array, ...]:
        """The tensors that the parameter, whole on the host or on one device, is made of."""
        return self.form.split(self.sizes, slots.gather(self.kind, x, self.repeats))

    @property
    def axis(self) -> int | None:
        """The axis of the parameter that is sharded."""
        return next((i for i, name in enumerate(self.sharding.spec) if name is not None), None)

    @property
    def read_axis(self) -> int | None:
        """The axis along which the devices divide every tensor among them; None where they read it whole."""
        if self.axis is None or self.repeats > 1:
            return None
        return self.axis if self.form is forms.SAME else self.form.shard_axis

    @property
    def read_spec(self) -> PartitionSpec:
        if self.axis is None or self.read_axis is None:
            return PartitionSpec()
        return PartitionSpec(*(None,) * self.read_axis, self.sharding.spec[self.axis])

    @cached_property
    def reading(self) -> list[NamedSharding]:
        """The sharding to read each tensor with."""
        if self.form.per_expert:
            return self._reading_by_expert()
        return [NamedSharding(self.sharding.mesh, self.read_spec)] * len(self.sources)

    def _reading_by_expert(self) -> list[NamedSharding]:
        """An expert's tensors are read by the devices that hold the expert."""
        holders = defaultdict(list)
        for device, (experts, *_) in self.sharding.devices_indices_map(self.shape).items():
            for expert in range(*experts.indices(self.shape[0])):
                holders[expert].append(device)
        meshes = [Mesh(np.asarray(holders[expert]), ("copies",)) for expert in range(self.shape[0])]
        tensors_each = len(self.sources) // self.shape[0]
        return [NamedSharding(mesh, PartitionSpec()) for mesh in meshes for _ in range(tensors_each)]

    def __call__(self, tensors: Sequence[jax.Array]) -> jax.Array:
        """The parameter, of tensors that were read with `reading`."""
        if self.form is forms.SAME and self.repeats == 1 and tensors[0].dtype == self.dtype:
            return jax.device_put(tensors[0], self.sharding)
        return _assemble(self, *(self._side_by_side(tensors) if self.form.per_expert else tensors))

    def _side_by_side(self, tensors: Sequence[jax.Array]) -> list[jax.Array]:
        """Expert tensors as arrays over the whole mesh, one for each tensor that a device holds."""
        each = self.sharding.shard_shape(self.shape)[0] * len(tensors) // self.shape[0]
        spread = NamedSharding(self.sharding.mesh, self.read_spec)
        arrays = []
        for place in range(each):
            group = tensors[place::each]
            rows, *rest = group[0].shape
            shards = [shard.data for tensor in group for shard in tensor.addressable_shards]
            shape = (rows * len(group), *rest)
            arrays.append(jax.make_array_from_single_device_arrays(shape, spread, shards, dtype=group[0].dtype))
        return arrays

    def local(self, *tensors: jax.Array) -> jax.Array:
        """One device's shard of the parameter."""
        parts = [tensor.astype(self.dtype) for tensor in tensors]
        whole = slots.spread(self.kind, self.form.join(self.sizes, *parts), self.repeats)
        if self.axis is None or self.read_axis is not None:
            return whole
        size = self.sharding.shard_shape(self.shape)[self.axis]
        first = jax.lax.axis_index(self.sharding.spec[self.axis]) * size
        return jax.lax.dynamic_slice_in_dim(whole, first, size, self.axis)


@partial(jax.jit, static_argnums=0)
def _assemble(how: Assembly, *tensors: jax.Array) -> jax.Array:
    mesh, spec = how.sharding.mesh, how.sharding.spec
    return jax.shard_map(how.local, mesh=mesh, in_specs=(how.read_spec,) * len(tensors), out_specs=spec)(*tensors)

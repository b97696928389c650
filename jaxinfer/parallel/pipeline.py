"""Pipeline parallelism: stages of layers on the devices along the axis `pipe`, and micro-batches that go from one to
the next (Huang et al. 2019, "GPipe", arXiv 1811.06965, section 2).

All stages run one program. A parameter of a layer, or its pages, of all stages are one array: their values lie one
after the other on its first axis, which is sharded over `pipe` before anything else. So what a device holds has the
shape of one layer's, and the layers run as they do without a pipe; on a new axis, XLA would copy every cache.

Only the layers are in the region that is manual over `pipe`. There a micro-batch moves by a send from each stage to
the next; embedding, head and sampling stand outside, where all stages have the same rows and an equal part of the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer.parallel.mesh import PIPE

# Rows whose arithmetic takes about as long as reading the weights, of 16 bits, once: 295 on an H100, 206 on an H200. A
# tick of fewer takes no less time, so that more of them would only make a step longer.
FEW_ROWS = 256
MOST_PER_STAGE = 4  # micro-batches: then the bubble is below 1/5

# What the layers of a stage need to know of its micro-batch, from what all stages are told and the stage's number.
BatchOf = Callable[[Any, jax.Array], Any]
# Runs the layers of a stage: its weights, states, a micro-batch's x_tD and what the layers need to know of it, to x_tD
# behind the last layer, what was asked for of those before, and the new states.
Stage = Callable[[Any, Any, jax.Array, Any], tuple[jax.Array, tuple[jax.Array, ...], Any]]


class Exit(NamedTuple):
    """Hidden states that leave a pipe: those of one stage, by their place among what that stage gives."""

    stage: int
    place: int


def ticks(microbatches: int, stages: int, rounds: int = 1) -> int:
    """In each every stage computes a micro-batch and hands it over. Of m + p - 1 for m micro-batches in p stages, a
    stage idles in p - 1: that is the bubble.

    Args:
        rounds: how often the micro-batches go through all stages before the pipe drains. The first one of a round
            enters when it has left the last stage in the round before: stages wait for it, if there are fewer.
    """
    return (rounds - 1) * max(microbatches, stages) + microbatches + stages - 1


@dataclass(frozen=True)
class Round:
    """When micro-batches that go round and round enter and leave a pipe; each enters once a round.

    Attributes:
        rounds: of each micro-batch.
    """

    microbatches: int
    stages: int
    rounds: int

    @classmethod
    def of(cls, rows: int, stages: int, rounds: int) -> Round:
        """Of so many rows: in as few micro-batches as keep all stages at work, since each reads all weights."""
        enough = (count for count in range(stages, rows) if rows % count == 0)
        return cls(next(enough, rows), stages, rounds)

    @property
    def period(self) -> int:
        """Ticks from one entry of a micro-batch to the next."""
        return max(self.microbatches, self.stages)

    @property
    def ticks(self) -> int:
        return ticks(self.microbatches, self.stages, self.rounds)

    def entered(self, tick: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The micro-batch that enters the first stage in a tick, and whether there is one; else it is any."""
        there = (tick >= 0) & (tick < self.rounds * self.period) & (tick % self.period < self.microbatches)
        return jnp.where(there, tick % self.period, 0), there

    def leaves_in(self) -> np.ndarray:
        """The tick in which each leaves the last stage, by round and micro-batch."""
        return np.arange(self.rounds)[:, None] * self.period + np.arange(self.microbatches) + self.stages - 1


def microbatches(rows: int, parts: int, stages: int) -> int:
    """Into how many micro-batches a step is divided whose pipe drains: as many as have `FEW_ROWS` rows each, but no
    more than make the bubble small.

    Args:
        parts: into which the rows can be divided.
    """
    wanted, count = min(rows // FEW_ROWS, MOST_PER_STAGE * stages), 1
    while 2 * count <= wanted and parts % (2 * count) == 0:
        count *= 2
    return count


def staged(shape: Sequence[int], spec: P, stages: int) -> tuple[tuple[int, ...], P]:
    """Shape and sharding of what all stages hold of a layer, of those that one layer has."""
    first, *rest = spec if len(spec) else (None,)
    names = () if first is None else first if isinstance(first, tuple) else (first,)
    return (stages * shape[0], *shape[1:]), P((PIPE, *names) if names else PIPE, *rest)


def stage_mesh(mesh: Mesh, stage: int) -> Mesh:
    """The devices of one stage, as a mesh with the same axes."""
    axis = mesh.axis_names.index(PIPE)
    return Mesh(np.take(mesh.devices, [stage], axis), mesh.axis_names, axis_types=mesh.axis_types)


def of_stage(leaf: jax.ShapeDtypeStruct, stage: int, stages: int) -> jax.ShapeDtypeStruct:
    """One stage's part of an array that is `staged`, on the devices of that stage."""
    first, *rest = _sharding(leaf).spec
    names = first[1:] if isinstance(first, tuple) else ()
    own = names if len(names) > 1 else names[0] if names else None
    mesh = _sharding(leaf).mesh
    assert isinstance(mesh, Mesh)
    sharding = NamedSharding(stage_mesh(mesh, stage), P(own, *rest))
    return jax.ShapeDtypeStruct((leaf.shape[0] // stages, *leaf.shape[1:]), leaf.dtype, sharding=sharding)


def join(leaf: jax.ShapeDtypeStruct, parts: Sequence[jax.Array]) -> jax.Array:
    """The array that is `staged`, of the parts of all stages, each on its devices. Nothing is copied."""
    shards = [shard.data for part in parts for shard in part.addressable_shards]
    first, *rest = parts[0].shape
    return jax.make_array_from_single_device_arrays(
        (len(parts) * first, *rest), _sharding(leaf), shards, dtype=leaf.dtype
    )


def part(array: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """One stage's part of an array that is `staged`, as `of_stage` says. Nothing is copied."""
    held = _sharding(leaf).device_set
    shards = [shard.data for shard in array.addressable_shards if shard.device in held]
    return jax.make_array_from_single_device_arrays(leaf.shape, _sharding(leaf), shards, dtype=leaf.dtype)


def run(
    stage: Stage, weights: Any, states: Any, x_mtD: jax.Array, batches: Any, exits: tuple[Exit, ...], stages: int
) -> tuple[tuple[jax.Array, ...], Any]:  # fmt: skip
    """Micro-batches through the first `stages` stages, until the pipe has drained.

    Args:
        stage: the layers of one stage; the same for all.
        weights, states: pytrees of arrays that are `staged`. The states come back changed, in place where donated.
        x_mtD: what enters the first stage, on all devices: m micro-batches of t rows.
        batches: what the layers need to know of each, with a leading axis of m + 1: the last entry is of a micro-batch
            in which nothing is computed that counts, and nothing but null pages is written. It runs in the bubble.
        exits: what is wanted.

    Returns:
        of every exit hidden states of all micro-batches, [m, t, D], on all devices; the states.
    """
    count = x_mtD.shape[0]

    def local(weights, states, x_mtD, batches):
        rank = jax.lax.axis_index(PIPE)

        def tick(now, carry):
            x_tD, states, left = carry
            entered = now - rank
            runs = (entered >= 0) & (entered < count) & (rank < stages)
            place = jnp.where(runs, entered, count)
            x_tD = jnp.where(rank == 0, _at(x_mtD, jnp.minimum(now, count - 1)), x_tD)
            x_tD, tapped, states = stage(weights, states, x_tD, jax.tree.map(lambda leaf: _at(leaf, place), batches))
            left = tuple(
                jax.lax.dynamic_update_index_in_dim(each, tapped[one.place], place, 0)
                for each, one in zip(left, exits, strict=True)
            )
            return _handed_on(x_tD), states, left

        none_mtD = jnp.zeros((count + 1, *x_mtD.shape[1:]), x_mtD.dtype)
        start = jnp.zeros_like(x_mtD[0]), states, (none_mtD,) * len(exits)
        # Unrolled, XLA would copy every cache.
        _, states, left = jax.lax.fori_loop(0, ticks(count, stages), tick, start)
        return tuple(_told(each[:count], one.stage) for each, one in zip(left, exits, strict=True)), states

    return _on_stages(local, (P(PIPE), P(PIPE), P(), P()), (P(), P(PIPE)))(weights, states, x_mtD, batches)


def advance(
    stage: Stage, weights: Any, states: Any, x_ptD: jax.Array, first_tD: jax.Array, batch_of: BatchOf, told: Any
) -> tuple[jax.Array, jax.Array, Any]:
    """One tick of a pipe that does not drain: each stage runs the micro-batch that it has, and hands it over.

    Args:
        stage, weights, states: see `run`. The last of what `stage` gives leaves the pipe.
        x_ptD: what each stage was handed, one after the other on the first axis, which is sharded over the stages.
        first_tD: what enters the first stage, on all devices.
        told: arrays that all devices have.

    Returns:
        what each stage is handed now; what leaves the last one, [t, D], on all devices; the states.
    """

    def local(weights, states, x_tD, first_tD, told):
        rank = jax.lax.axis_index(PIPE)
        x_tD = jnp.where(rank == 0, first_tD, x_tD)
        x_tD, tapped, states = stage(weights, states, x_tD, batch_of(told, rank))
        return _handed_on(x_tD), _told(tapped[-1], jax.lax.axis_size(PIPE) - 1), states

    specs = (P(PIPE), P(PIPE), P(PIPE), P(), P())
    return _on_stages(local, specs, (P(PIPE), P(), P(PIPE)))(weights, states, x_ptD, first_tD, told)


def empty(stages: int, rows: int, hidden: int, dtype: jnp.dtype) -> jax.Array:
    """x_ptD of a pipe with nothing in it."""
    return jax.sharding.reshard(jnp.zeros((stages * rows, hidden), dtype), P(PIPE, None))


def _on_stages(local: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Manual over `pipe` alone: within, the helpers of `collectives` are manual over `tensor`, as anywhere. What all
    stages were told is not typed as the same, so types are not checked."""
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, axis_names={PIPE}, check_vma=False)


def _at(array: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, index, keepdims=False)


def _handed_on(x_tD: jax.Array) -> jax.Array:
    """What the stage before had; zeros in the first."""
    return jax.lax.ppermute(x_tD, PIPE, [(rank, rank + 1) for rank in range(jax.lax.axis_size(PIPE) - 1)])


def _told(x: jax.Array, owner: int) -> jax.Array:
    """What one stage has, on all: each round doubles those that have it."""
    size, told = jax.lax.axis_size(PIPE), 1
    place = (jax.lax.axis_index(PIPE) - owner) % size
    while told < size:
        pairs = [((owner + at) % size, (owner + at + told) % size) for at in range(min(told, size - told))]
        x = jnp.where((place >= told) & (place < 2 * told), jax.lax.ppermute(x, PIPE, pairs), x)
        told *= 2
    return x


def _sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    assert isinstance(leaf.sharding, NamedSharding)
    return leaf.sharding

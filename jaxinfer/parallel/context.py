"""Sequences that devices share: the axis `context`. Who has which of a step's rows, and how blocks of them go round.

A step with prompts in it spreads its rows over the ranks: each rank has two blocks of them, one from the front and
one from the back (zig-zag order), so that under a causal mask all have as much to do (Llama 3, Grattafiori et al.
2024, section 3.3.2). What decodes alone is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.sharding import get_abstract_mesh

from jaxinfer.parallel.mesh import CONTEXT
from jaxinfer.parallel.ring import passed_on


def ranks() -> int:
    """Devices that share a sequence, on the mesh in force."""
    return get_abstract_mesh().shape.get(CONTEXT, 1)


def row_axis(x_T: jax.Array) -> str | None:
    """The axis that the rows of an array are spread over, by its type; None where each device has them all."""
    spec = jax.typeof(x_T).sharding.spec
    return spec[0] if len(spec) else None


def first_rows(rows: int, rank: jax.Array | int, ranks: int) -> tuple[Any, Any]:
    """Where the two blocks of a rank begin among the rows of a step, each of them rows / (2 x ranks) long."""
    block = rows // (2 * ranks)
    return rank * block, (2 * ranks - 1 - rank) * block


def zigzag(rows: int, ranks: int) -> np.ndarray:
    """The rows of a step in the order in which they lie over the ranks, [T]."""
    block = np.arange(rows // (2 * ranks), dtype=np.int32)
    return np.concatenate([first + block for rank in range(ranks) for first in first_rows(rows, rank, ranks)])


def places(rows: int, ranks: int) -> np.ndarray:
    """Where each row lies: the inverse of `zigzag`."""
    return np.argsort(zigzag(rows, ranks)).astype(np.int32)


def deal_rows(x_T: jax.Array) -> jax.Array:
    """What every rank has of all rows, so that each has its own; the same array where there is one rank.

    Raises:
        ValueError: the rows do not make two equal blocks for each rank.
    """
    if (count := ranks()) == 1:
        return x_T
    if len(x_T) % (2 * count):
        raise ValueError(
            f"a step has {len(x_T)} rows, which do not make two equal blocks for each of the {count} devices of mesh "
            f"axis {CONTEXT}; multiples of {2 * count} would"
        )
    return jax.sharding.reshard(x_T[zigzag(len(x_T), count)], P(CONTEXT))


def take_rows(x_TD: jax.Array, rows_W: jax.Array) -> jax.Array:
    """Some rows of a step on every device that has a part of each, whether the rows are spread over devices or not."""
    if row_axis(x_TD) is not None:
        # Each device gives the rows that it has, and a sum over the devices brings them together.
        rows_W = jnp.asarray(places(x_TD.shape[0], ranks()))[rows_W]
    return x_TD.at[rows_W].get(out_sharding=P(None, *jax.typeof(x_TD).sharding.spec[1:]))


def visit(step: Callable[[Any, Any, jax.Array], Any], found: Any, block: Any) -> Any:
    """`found = step(found, block, owner)` for the block of every rank, which go round in a ring; a rank's own comes
    first (Liu et al. 2023, "Ring Attention with Blockwise Transformers", section 3).

    In a `shard_map`. The next block is asked for before the last one that came is worked on.
    """
    count, rank = jax.lax.axis_size(CONTEXT), jax.lax.axis_index(CONTEXT)

    def turn(nth: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        found, block = carry
        coming = passed_on(block, CONTEXT)
        return step(found, block, _owner(rank, nth, count)), coming

    found, block = jax.lax.fori_loop(0, count - 1, turn, (found, block))
    return step(found, block, _owner(rank, jnp.int32(count - 1), count))


def travel(step: Callable[[Any, jax.Array], Any], block: Any, needed: jax.Array) -> Any:
    """`block = step(block, owner)` on every rank for each block, which come home after a whole round.

    Args:
        needed: bool scalar, the same on all ranks: whether they go at all.
    """
    count, rank = jax.lax.axis_size(CONTEXT), jax.lax.axis_index(CONTEXT)

    def turn(nth: jax.Array, block: Any) -> Any:
        return passed_on(step(block, _owner(rank, nth, count)), CONTEXT)

    return jax.lax.fori_loop(0, jnp.where(needed, count, 0), turn, block)


def _owner(rank: jax.Array, nth: jax.Array, count: int) -> jax.Array:
    """Whose block a rank has in the nth turn."""
    return (rank - nth) % count

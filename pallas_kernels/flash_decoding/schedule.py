"""Who reads what: the keys of all slots, spread evenly over the CTAs of the GPU.

The keys of a slot are cut into tiles. Slot after slot, and within a slot head after head, the tiles form one long
row, and every pipeline takes an equal stretch of it, wherever that starts and ends (Stream-K, Osama et al. 2023,
applied to FlashDecoding, Dao et al. 2023). So a batch of very different lengths keeps all of them busy to the end. A
*unit* is the work of one slot, KV head and block of query rows; where several stretches meet in a unit, each leaves a
partial result, and one of them merges these. Empty slots have no part in it.

Where there are no more units than stretches, and all of them short, none is cut: to join parts takes longer than a few
tiles. The units are then spread over the stretches, of which some stay empty.

The arithmetic is a few operations on small arrays, done once per step for all layers of a cache group.
"""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.checks import require
from pallas_kernels.flash_decoding.config import TILE_KEYS

FEW_TILES = 6  # of a unit: so many, one after the other, took less time than their parts and the joining of these


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Schedule:
    """The C stretches, and what has to be merged afterwards.

    Attributes:
        work_C5: slot, unit within the slot, tile within the unit, and number of tiles of each stretch; and the stretch
            in which its first unit begins.
        merge_C4: for each stretch the unit that begins in it and ends in another: its number (slots x units), the
            partial result that holds its beginning, the first of those that hold the rest, and their number; -1 in
            front where there is none.
        tickets_C1: zeros, on which stretches count each other's signals within a launch; every launch leaves them at
            zero.
        slots, queries, window, units: what it was made for: slots, queries of a slot, the sliding window, units of a
            slot.
    """

    work_C5: jax.Array
    merge_C4: jax.Array
    tickets_C1: jax.Array
    slots: int = field(metadata={"static": True})
    queries: int = field(metadata={"static": True})
    window: int | None = field(metadata={"static": True})
    units: int = field(metadata={"static": True})

    def check(self, **problem: int | None) -> None:
        """
        Raises:
            ValueError: it was made for another problem; names the first of the above that differs.
        """
        for name, value in problem.items():
            require(getattr(self, name) == value, f"schedule.{name}", getattr(self, name), f"{value}, as this call's")


@partial(jax.jit, static_argnames=("queries", "window", "units", "stretches"))
def make_schedule(lengths_B: jax.Array, *, queries: int, window: int | None, units: int, stretches: int) -> Schedule:
    """The schedule of one step.

    Args:
        lengths_B: int32, keys of each slot, those of its queries included.
        queries: of each slot.
        window: keys that a query sees, itself included; None for all.
        units: of a slot: KV heads x blocks of query rows.
        stretches: of the launch.
    """
    _, tiles_B = tiles_in_sight(lengths_B, queries, window)
    end_B = jnp.cumsum(tiles_B * units)
    nth_C1 = jnp.arange(stretches + 1, dtype=jnp.int32)
    start_C1 = _even(end_B[-1], nth_C1, stretches)
    if len(lengths_B) * units <= stretches:
        few = jnp.max(tiles_B) <= FEW_TILES
        start_C1 = jnp.where(few, _whole(tiles_B, end_B, units, nth_C1, stretches), start_C1)
    start_C, end_C = start_C1[:-1], start_C1[1:]

    slot_C, unit_C, tile_C = _locate(start_C, end_B, tiles_B, units)
    owner_C = _places(start_C, start_C - tile_C, "right") - 1
    work_C5 = jnp.stack([slot_C, unit_C, tile_C, end_C - start_C, owner_C], axis=1)

    last_slot_C, last_unit_C, last_tile_C = _locate(end_C - 1, end_B, tiles_B, units)
    unit_start_C = end_C - 1 - last_tile_C
    unit_end_C = unit_start_C + tiles_B[last_slot_C]
    splits_C = (start_C < end_C) & (unit_start_C >= start_C) & (unit_end_C > end_C)
    following_C = _places(start_C, unit_end_C, "left") - nth_C1[1:]
    merge_C4 = jnp.stack(
        [
            jnp.where(splits_C, last_slot_C * units + last_unit_C, -1),
            partial_index(nth_C1[:-1], unit_start_C == start_C, stretches),
            partial_index(nth_C1[1:], True, stretches),
            following_C,
        ],
        axis=1,
    )
    return Schedule(work_C5, merge_C4, jnp.zeros((stretches, 1), jnp.int32), len(lengths_B), queries, window, units)


def _even(total: jax.Array, nth_C1: jax.Array, stretches: int) -> jax.Array:
    """Where stretches begin that are equal to a tile, and where the last ends."""
    used = jnp.clip(total, 1, stretches)
    # Floor of nth * total / used, in steps that cannot overflow.
    share, rest = total // used, total % used
    return jnp.where(nth_C1 < used, nth_C1 * share + nth_C1 * rest // used, total)


def _whole(tiles_B: jax.Array, end_B: jax.Array, units: int, nth_C1: jax.Array, stretches: int) -> jax.Array:
    """The same where each has one unit or none, and those with one lie as far apart as they can."""
    unit_C1 = nth_C1 * (len(tiles_B) * units) // stretches
    slot_C1 = jnp.minimum(unit_C1 // units, len(tiles_B) - 1)
    return end_B[slot_C1] - tiles_B[slot_C1] * (units - (unit_C1 - slot_C1 * units))


def tiles_in_sight(lengths_B: jax.Array, queries: int, window: int | None) -> tuple[jax.Array, jax.Array]:
    """The first tile that a slot's queries see, and how many there are."""
    end_B = -(-lengths_B // TILE_KEYS)
    first_B = jnp.zeros_like(end_B)
    if window is not None:
        first_B = jnp.maximum(lengths_B - queries - window + 1, 0) // TILE_KEYS
    return first_B, end_B - first_B


def partial_index(stretch, begins_it, stretches: int):
    """Where a stretch leaves the part of a unit: its first one behind the last ones of all."""
    return stretch + jnp.where(begins_it, stretches, 0)


def _locate(
    tile_C: jax.Array, end_B: jax.Array, tiles_B: jax.Array, units: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Slot, unit and tile within the unit of places in the long row."""
    slot_C = jnp.minimum(_places(end_B, tile_C, "right"), len(end_B) - 1)
    within_C = tile_C - (end_B[slot_C] - tiles_B[slot_C] * units)
    tiles_C = jnp.maximum(tiles_B[slot_C], 1)
    return slot_C, within_C // tiles_C, within_C % tiles_C


def _places(sorted_A: jax.Array, x_C: jax.Array, side: str) -> jax.Array:
    """Comparing with all is one kernel for the GPU, where a binary search is a loop of them."""
    return jnp.searchsorted(sorted_A, x_C, side=side, method="compare_all").astype(jnp.int32)

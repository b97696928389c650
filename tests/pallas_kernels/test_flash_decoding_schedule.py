"""The schedule of flash_decoding: every tile is read once, all CTAs read alike, and what is cut is joined."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.flash_decoding import schedule
from pallas_kernels.flash_decoding.schedule import partial_index, tiles_in_sight

PROBLEMS = st.fixed_dictionaries({
    "lengths": st.lists(st.integers(0, 1000), min_size=4, max_size=4),  # one shape, so that little is compiled
    "queries": st.sampled_from([1, 4]),
    "window": st.sampled_from([None, 1, 200]),
    "units": st.sampled_from([1, 3]),
    "ctas": st.sampled_from([1, 5, 40]),
})  # fmt: skip
make_schedule = jax.jit(schedule.make_schedule, static_argnames=("queries", "window", "units", "ctas"))


def stretches(made, tiles_B):
    """The tiles of every CTA, as (slot, unit, tile), by walking as the kernel does."""
    for slot, unit, tile, left, _ in np.asarray(made.work_C5).tolist():
        walked = []
        for _ in range(left):
            walked.append((slot, unit, tile))
            tile += 1
            if tile == tiles_B[slot]:
                slot, unit, tile = (slot + 1, 0, 0) if unit == made.units - 1 else (slot, unit + 1, 0)
        yield walked


@settings(max_examples=60, deadline=None)
@given(PROBLEMS)
def test_every_tile_is_read_once_and_ctas_read_alike(problem):
    lengths = jnp.array(problem.pop("lengths"), jnp.int32)
    made = make_schedule(lengths, **problem)
    _, tiles_B = map(np.asarray, tiles_in_sight(lengths, problem["queries"], problem["window"]))
    walks = list(stretches(made, tiles_B))
    every = [(b, u, t) for b, tiles in enumerate(tiles_B) for u in range(problem["units"]) for t in range(tiles)]
    assert [tile for walk in walks for tile in walk] == every
    counts = [len(walk) for walk in walks if walk]
    assert max(counts) - min(counts) <= 1


@settings(max_examples=60, deadline=None)
@given(PROBLEMS)
def test_the_parts_of_a_cut_unit_are_joined_where_it_begins(problem):
    lengths, ctas = jnp.array(problem.pop("lengths"), jnp.int32), problem["ctas"]
    made = make_schedule(lengths, **problem)
    _, tiles_B = map(np.asarray, tiles_in_sight(lengths, problem["queries"], problem["window"]))
    parts: dict[int, list[tuple[int, int]]] = {}  # of a unit, by CTA: where it is left
    for cta, walk in enumerate(stretches(made, tiles_B)):
        units = list(dict.fromkeys((slot, unit) for slot, unit, _ in walk))
        for place, (slot, unit) in enumerate(units):
            if sum(entry[:2] == (slot, unit) for entry in walk) < tiles_B[slot]:
                index = int(partial_index(cta, place == 0, ctas))
                parts.setdefault(slot * problem["units"] + unit, []).append((cta, index))
    found = {}
    for cta, (unit, first, rest, count) in enumerate(np.asarray(made.merge_C4).tolist()):
        if unit >= 0:
            found[unit] = [(cta, first), *((cta + 1 + i, rest + i) for i in range(count))]
    assert found == parts
    owners = np.asarray(made.work_C5)[:, 4]
    assert all(owners[cta] == places[0][0] for places in parts.values() for cta, _ in places[1:])

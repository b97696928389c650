"""The schedule of flash_decoding: every tile is read once, in even stretches or whole units; what is cut is joined."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dispatch
from pallas_kernels.blockwise import Options, PagedKV
from pallas_kernels.flash_decoding import flash_decoding, mosaic_gpu, plan
from pallas_kernels.flash_decoding.config import Config
from pallas_kernels.flash_decoding.schedule import FEW_TILES, make_schedule, partial_index, tiles_in_sight
from tests.pallas_kernels.draws import on_the_host
from tests.pallas_kernels.gpu_program import interpreted

LENGTHS = st.lists(st.integers(0, 1000), min_size=4, max_size=4)  # one shape, so that little is compiled
# The least of all, and of the others every pair of two; each problem is compiled once.
PROBLEMS = [
    dict(zip(("queries", "window", "units", "stretches"), values, strict=True))
    for values in (
        (1, 1, 1, 1), (1, None, 1, 5), (1, 200, 3, 40), (4, None, 3, 5), (4, 200, 1, 5), (4, None, 1, 40),
    )
]  # fmt: skip


def walked(made, tiles_B):
    """The tiles of every stretch, as (slot, unit, tile), by walking as the kernel does."""
    for slot, unit, tile, left, _ in np.asarray(made.work_C5).tolist():
        tiles = []
        while left > 0:
            if tiles_B[slot] == 0:
                slot += 1
                continue
            tiles.append((slot, unit, tile))
            tile, left = tile + 1, left - 1
            if tile == tiles_B[slot]:
                slot, unit, tile = (slot + 1, 0, 0) if unit == made.units - 1 else (slot, unit + 1, 0)
        yield tiles


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.sampled_from(PROBLEMS))
def test_every_tile_is_read_once_in_even_stretches_or_whole_units(lengths, problem):
    lengths = jnp.array(lengths, jnp.int32)
    made = make_schedule(lengths, **problem)
    _, tiles_B = map(np.asarray, tiles_in_sight(lengths, problem["queries"], problem["window"]))
    walks = list(walked(made, tiles_B))
    every = [(b, u, t) for b, tiles in enumerate(tiles_B) for u in range(problem["units"]) for t in range(tiles)]
    assert [tile for walk in walks for tile in walk] == every
    if len(tiles_B) * problem["units"] <= problem["stretches"] and max(tiles_B) <= FEW_TILES:
        assert all(len(walk) == tiles_B[walk[0][0]] for walk in walks if walk)
    else:
        counts = [len(walk) for walk in walks if walk] or [0]
        assert max(counts) - min(counts) <= 1


def test_whole_units_lie_far_apart():
    made = make_schedule(jnp.full(4, 384, jnp.int32), queries=1, window=None, units=3, stretches=40)
    taken = np.flatnonzero(np.asarray(made.work_C5)[:, 3])
    assert len(taken) == 12
    assert set(np.diff(taken)) == {3, 4}


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.sampled_from(PROBLEMS))
def test_the_parts_of_a_cut_unit_are_joined_where_it_begins(lengths, problem):
    lengths, stretches = jnp.array(lengths, jnp.int32), problem["stretches"]
    made = make_schedule(lengths, **problem)
    _, tiles_B = map(np.asarray, tiles_in_sight(lengths, problem["queries"], problem["window"]))
    parts: dict[int, list[tuple[int, int]]] = {}  # of a unit, by stretch: where it is left
    for stretch, walk in enumerate(walked(made, tiles_B)):
        units = list(dict.fromkeys((slot, unit) for slot, unit, _ in walk))
        for place, (slot, unit) in enumerate(units):
            if sum(entry[:2] == (slot, unit) for entry in walk) < tiles_B[slot]:
                index = int(partial_index(stretch, place == 0, stretches))
                parts.setdefault(slot * problem["units"] + unit, []).append((stretch, index))
    found = {}
    for stretch, (unit, first, rest, count) in enumerate(np.asarray(made.merge_C4).tolist()):
        if unit >= 0:
            found[unit] = [(stretch, first), *((stretch + 1 + i, rest + i) for i in range(count))]
    assert found == parts
    owners = np.asarray(made.work_C5)[:, 4]
    assert all(owners[stretch] == places[0][0] for places in parts.values() for stretch, _ in places[1:])


def arguments(slots=2, queries=1, heads=8, kv_heads=2, dtype=jnp.bfloat16) -> tuple[jax.Array, ...]:
    """Of flash_decoding: lengths of 64 and less, one page of 64 keys for each slot."""
    normal = on_the_host()
    pools = [normal((slots, 64, kv_heads, 64), dtype) for _ in range(2)]
    q_BQNH = normal((slots, queries, heads, 64), dtype)
    table_BJ = jnp.arange(slots, dtype=jnp.int32)[:, None]
    return q_BQNH, *pools, table_BJ, 64 - jnp.arange(slots, dtype=jnp.int32)


def planned(q_BQNH, k_PSKH, v_PSKH, table_BJ, lengths_B, **options):
    return plan(q_BQNH, k_PSKH, table_BJ, lengths_B, **options)


def test_a_plan_is_made_where_the_kernel_runs():
    given = arguments()
    assert (planned(*given) is None) == (dispatch.automatic()[0] != dispatch.KERNEL)
    assert planned(*given, implementation="xla") is None
    made = planned(*given, window=9, implementation="mosaic_gpu")
    assert (made.slots, made.queries, made.window, made.units) == (2, 1, 9, 2)
    expected = make_schedule(given[-1], queries=1, window=9, units=2, stretches=len(made.work_C5))
    jax.tree.map(np.testing.assert_array_equal, made, expected)
    with pytest.raises(ValueError, match=r"cannot run: q.dtype is float32"):
        planned(*arguments(dtype=jnp.float32), implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_BQNH": jnp.ones((2, 8, 64), jnp.bfloat16)}, "q.shape"),
        ({"q_BQNH": jnp.ones((3, 1, 8, 64), jnp.bfloat16)}, r"q.shape .*2 slots"),
        ({"k_PSKH": jnp.ones((2, 64, 3, 64), jnp.bfloat16)}, r"k_pages.shape .*divides 8 query heads"),
        ({"k_PSKH": jnp.ones((2, 64, 2, 128), jnp.bfloat16)}, r"k_pages.shape .*head size 64"),
        ({"table_BJ": jnp.zeros(2, jnp.int32)}, r"page_table.shape .*2 axes"),
        ({"lengths_B": jnp.array([3, 65], jnp.int32)}, r"lengths .*\[65\]; allowed: 0 to 64"),
        ({"lengths_B": jnp.zeros(3, jnp.int32)}, "lengths.shape"),
        ({"lengths_B": jnp.zeros(2, jnp.float32)}, "lengths.dtype is float32"),
        ({"window": 0}, "window is 0"),
    ],
)
@pytest.mark.parametrize("implementation", ["auto", "mosaic_gpu"])
def test_what_a_plan_cannot_be_made_of_is_named(change, message, implementation):
    names = ("q_BQNH", "k_PSKH", "v_PSKH", "table_BJ", "lengths_B")
    given = dict(zip(names, arguments(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        planned(**given, implementation=implementation)


def test_shapes_are_enough_for_a_plan():
    q_BQNH, k_PSKH, _, *rest = arguments()
    q_shape, k_shape = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BQNH, k_PSKH))
    jax.tree.map(
        np.testing.assert_array_equal,
        plan(q_shape, k_shape, *rest, implementation="mosaic_gpu"),
        plan(q_BQNH, k_PSKH, *rest, implementation="mosaic_gpu"),
    )


@pytest.mark.parametrize(
    ("sizes", "window", "message"),
    [
        ({"slots": 3}, None, "schedule.slots is 3; allowed: 2"),
        ({"queries": 4}, None, "schedule.queries is 4; allowed: 1"),
        ({}, 5, "schedule.window is 5; allowed: None"),
        ({"kv_heads": 1}, None, "schedule.units is 1; allowed: 2"),
        ({"heads": 256}, None, "schedule.units is 4; allowed: 2"),
    ],
)
@pytest.mark.parametrize("implementation", ["auto", "mosaic_gpu"])
def test_a_schedule_of_another_problem_is_named(sizes, window, message, implementation):
    other = planned(*arguments(**sizes), window=window, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=message):
        flash_decoding(*arguments(), scale=0.1, schedule=other, implementation=implementation)


def test_a_schedule_of_another_gpu_is_named():
    given = arguments()
    other = make_schedule(given[-1], queries=1, window=None, units=2, stretches=7)
    with pytest.raises(ValueError, match="schedule is one for 7 stretches; allowed: one for the "):
        jax.eval_shape(partial(flash_decoding, scale=0.1, implementation="mosaic_gpu"), *given, schedule=other)


def test_calls_share_a_schedule():
    q_BQNH, k_PSKH, v_PSKH, table_BJ, lengths_B = arguments(slots=3, heads=4, kv_heads=1)
    config = Config(1, stages=2, interpretable=True)
    run = partial(mosaic_gpu.flash_decoding, sinks_N=None, options=Options(0.125), config=config)
    with interpreted():
        shared = make_schedule(lengths_B, queries=1, window=None, units=1, stretches=2)
        for k, v in ((k_PSKH, v_PSKH), (v_PSKH, k_PSKH)):
            results = (run(q_BQNH, PagedKV(k, v), table_BJ, lengths_B, schedule=given) for given in (shared, None))
            for x, y in zip(*results, strict=True):
                np.testing.assert_array_equal(x, y)


def test_layers_make_no_schedule_where_they_are_given_one():
    def three_layers(q_BQNH, k_PSKH, *rest, shared: bool):
        run = partial(flash_decoding, scale=0.1, implementation="mosaic_gpu")
        made = planned(q_BQNH, k_PSKH, *rest, implementation="mosaic_gpu") if shared else None
        for _ in range(3):
            q_BQNH = run(q_BQNH, k_PSKH, *rest, schedule=made)
        return q_BQNH

    calls = [
        str(jax.make_jaxpr(partial(three_layers, shared=shared))(*arguments())).count("name=make_schedule")
        for shared in (True, False)
    ]
    assert calls == [1, 3]

"""When micro-batches enter and leave a pipe, and how arrays of all its stages are held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfer.parallel import make_mesh, pipeline
from jaxinfer.parallel.pipeline import Round, microbatches, of_stage, staged, ticks


@pytest.mark.parametrize(
    ("count", "stages", "rounds"), [(1, 2, 1), (4, 2, 1), (2, 2, 5), (8, 4, 3), (1, 4, 3), (3, 4, 2)]
)
def test_a_pipe_by_hand(count, stages, rounds):
    """A micro-batch is in one stage at a time, a stage has one at a time, and none enters again before it has left."""
    plan, seen = Round(count, stages, rounds), {}
    grid = np.arange(plan.ticks, dtype=np.int32)[:, None] - np.arange(stages, dtype=np.int32)
    places, there = map(np.asarray, plan.entered(jnp.asarray(grid)))
    for tick, stage in np.argwhere(there).tolist():
        seen.setdefault(int(places[tick, stage]), []).append((tick, stage))
    assert sorted(seen) == list(range(count))
    for place, visits in seen.items():
        assert [stage for _, stage in visits] == list(range(stages)) * rounds
        assert len({tick for tick, _ in visits}) == len(visits)
        assert [tick for tick, stage in visits if stage == stages - 1] == plan.leaves_in()[:, place].tolist()
    assert max(tick for visits in seen.values() for tick, _ in visits) == plan.ticks - 1
    idle = 1 - sum(map(len, seen.values())) / (plan.ticks * stages)
    if rounds == 1:
        assert idle == pytest.approx((stages - 1) / (count + stages - 1))


def test_a_pipe_that_does_not_drain_idles_less():
    assert ticks(2, 2, 8) == 8 * 2 + 1 < 8 * ticks(2, 2)
    assert [Round.of(rows, 4, 1).microbatches for rows in (1, 2, 6, 8, 12, 64)] == [1, 2, 6, 4, 4, 4]


@pytest.mark.parametrize(
    ("rows", "parts", "count"), [(1, 1, 1), (256, 256, 1), (512, 512, 2), (8192, 8192, 8), (2048, 2, 2), (1536, 3, 1)]
)
def test_a_step_has_as_many_micro_batches_as_have_enough_rows(rows, parts, count):
    assert microbatches(rows, parts, 2) == count


def test_one_stage_s_part_of_an_array_lies_on_its_devices():
    """Put together and taken apart without a copy, whatever else its first axis is sharded over."""
    mesh = make_mesh(tensor=2, pipe=2)
    for spec in (P("tensor", None), P(None, "tensor"), P(None, None)):
        shape, of_all = staged((4, 6), spec, 2)
        assert shape == (8, 6)
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, of_all))
        values = np.arange(48, dtype=np.float32).reshape(shape)
        parts = [jax.device_put(values[4 * at : 4 * at + 4], of_stage(leaf, at, 2).sharding) for at in range(2)]
        assert [part.sharding.device_set for part in parts] == [set(row.flat) for row in mesh.devices]
        whole = pipeline.join(leaf, parts)
        assert whole.sharding == leaf.sharding
        np.testing.assert_array_equal(whole, values)
        for stage, part in enumerate(parts):
            again = pipeline.part(whole, of_stage(leaf, stage, 2))
            np.testing.assert_array_equal(again, part)
            assert pointers(again) == pointers(part)


def pointers(array: jax.Array) -> set[int]:
    return {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}

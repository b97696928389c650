"""What a mesh does to steps and memory: every axis against the whole model, or against a count by hand."""

import dataclasses
from collections import Counter
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.model.config import MoEConfig
from jaxinfer.roofline.cost import Cost, Work
from jaxinfer.roofline.hardware import DATASHEETS, MEASURED
from jaxinfer.roofline.memory import plan_memory
from jaxinfer.roofline.mesh import Mesh, Share, check_mesh, meshes, stages
from jaxinfer.roofline.pipeline import STEPS, Pipeline, decode_on, prefill_on
from jaxinfer.roofline.step import decode_step, prefill
from tests.roofline.small import small, sparse, windowed

H200 = MEASURED["h200-measured"]
DEEP = small(layers=windowed(None, 100, None, 100, None, 100), num_kv_heads=4, hidden_size=512)
EXPERTS = dataclasses.replace(DEEP, layers=sparse(MoEConfig(16, 2, 256)))
HIDDEN = 512 * 2  # bytes of a token


def pipeline(seconds: list[list[float]], circulates: bool = False) -> Pipeline:
    """Stages that read memory for so many seconds, by micro-batch."""
    grid = [[Cost({"read": Work(weights=time * H200.bandwidth)}, 1) for time in row] for row in seconds]
    return Pipeline(tuple(map(tuple, grid)), circulates, len(seconds))


def simulate(seconds: list[list[float]]) -> float:
    """A clock that all stages share, with one micro-batch at most in each."""
    places, clock, waiting = [None] * len(seconds[0]), 0.0, list(range(len(seconds)))
    while waiting or any(place is not None for place in places[:-1]):
        places = [waiting.pop(0) if waiting else None, *places[:-1]]
        clock += max(seconds[batch][stage] for stage, batch in enumerate(places) if batch is not None)
    return clock


times = st.integers(1, 9).map(float)


@given(st.integers(1, 4).flatmap(lambda depth: st.lists(st.lists(times, min_size=depth, max_size=depth), min_size=1)))
def test_a_pipe_that_drains_takes_the_ticks_of_a_simulation(seconds):
    assert pipeline(seconds).limit(H200) == pytest.approx(simulate(seconds))


@given(st.lists(times, min_size=1, max_size=4), st.integers(1, 6))
def test_a_pipe_that_circulates_takes_what_another_step_adds(row, microbatches):
    """Steps follow each other once the first micro-batch has left the last stage."""
    period = max(microbatches, len(row))
    idle = [0.0] * len(row)
    steps = [([row] * microbatches + [idle] * (period - microbatches)) * count for count in (3, 4)]
    found = pipeline([row] * microbatches, circulates=True)
    assert found.limit(H200) == pytest.approx(simulate(steps[1]) - simulate(steps[0]))
    assert found.limit(H200) <= found.predict(H200) * (1 + 1e-9)
    program = ([row] * microbatches + [idle] * (period - microbatches)) * (STEPS - 1) + [row] * microbatches
    assert found.predict(H200) == pytest.approx(simulate(program) / STEPS)


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (1, 4), (2, 2), (4, 1), (4, 8)])
def test_the_bubble_is_the_time_that_stages_idle(stages, microbatches):
    found = pipeline([[1.0] * stages] * microbatches)
    assert found.bubble == pytest.approx(1 - microbatches / found.limit(H200))
    circulating = pipeline([[1.0] * stages] * microbatches, circulates=True)
    assert circulating.bubble == pytest.approx(1 - microbatches / circulating.predict(H200))


def totals(costs) -> dict[tuple[str, str], float]:
    added: Counter = Counter()
    for name, part in (item for cost in costs for item in cost.parts.items()):
        for field in ("flops", "bytes", "sent", "messages"):
            added[name, field] += getattr(part, field)
    return dict(added)


@pytest.mark.parametrize("config", [DEEP, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("experts", ["replicated", "all-to-all"])
def test_stages_add_up_to_the_model(config, experts):
    mesh, share = Mesh(pipe=2, tensor=2), Share(experts=experts)
    decoding = decode_on(config, mesh, 8, 300, experts=experts, microbatches=1)
    reading = prefill_on(config, mesh, 300, experts=experts)
    pairs = [
        (decoding, decode_step(config, 8, 300, tensor_parallel=2, share=share)),
        (reading, prefill(config, 300, tensor_parallel=2, share=share)),
    ]
    for split, whole in pairs:
        found = totals(split.grid[0])
        assert (found.pop(("hand-over", "sent")), found.pop(("hand-over", "messages"))) == (whole.tokens * HIDDEN, 1)
        assert {key: value for key, value in found.items() if key[0] != "hand-over"} == pytest.approx(totals([whole]))


def test_chunks_of_a_prompt_go_through_the_pipe_one_after_the_other():
    found = prefill_on(DEEP, Mesh(pipe=3), 250, chunk=100)
    assert [[stage.tokens for stage in row] for row in found.grid] == [[100] * 3, [100] * 3, [50] * 3]
    whole = prefill(DEEP, 250)
    assert totals(cost for row in found.grid for cost in row)["mlp", "flops"] == whole.parts["mlp"].flops
    assert totals(cost for row in found.grid for cost in row)["attention", "flops"] == whole.parts["attention"].flops


def test_what_is_sent_is_that_of_the_busiest_stage_in_all_micro_batches():
    found = decode_on(DEEP, Mesh(pipe=3, tensor=2), 8, 300, microbatches=4)
    first = 2 * 2 + 1  # all-reduces of two layers and of the embedding, each of two sequences
    assert found.collectives() == {
        "all-reduce": (4 * first * 2 * HIDDEN, 4 * first),
        "hand-over": (4 * 2 * HIDDEN, 4),
    }


@pytest.mark.parametrize("ranks", [2, 4])
def test_context_parallelism_divides_a_prompt(ranks):
    one, many = prefill(DEEP, 400), prefill(DEEP, 400, share=Share(ranks))
    for part in ("projections", "mlp", "attention"):
        assert many.parts[part].flops == one.parts[part].flops / ranks
    assert many.parts["mlp"].weights == one.parts["mlp"].weights
    assert many.parts["head"] == one.parts["head"]
    keys = 6 * 400 * 2 * 4 * 64 * 2  # in six layers: 400 keys and values of 4 heads of 64 numbers
    assert many.parts["attention"].sent == keys * (ranks - 1) / ranks
    assert many.parts["attention"].messages == 6 * (ranks - 1)
    assert many.tokens == one.tokens


def test_a_chunk_sends_around_what_its_windows_see():
    chunk = prefill(DEEP, 50, cached=350, share=Share(2))
    keys = 3 * (400 + 100 + 50 - 1)  # three layers see all, three a window of 100 before each of 50 queries
    assert chunk.parts["attention"].sent == keys * 2 * 4 * 64 * 2 / 2


@pytest.mark.parametrize("ranks", [2, 4])
def test_context_parallelism_divides_the_cache_that_decoding_reads_and_merges(ranks):
    one, many = (decode_step(DEEP, 8, 400, tensor_parallel=2, share=Share(count)) for count in (1, ranks))
    assert many.parts["attention"].cache == one.parts["attention"].cache / ranks
    assert many.parts["attention"].flops == one.parts["attention"].flops / ranks
    merge = many.parts["merge"]
    # Of 8 queries with 4 heads on a device, 64 sums of values, a maximum and a sum, in float32.
    assert (merge.sent, merge.messages) == (6 * 8 * 4 * 66 * 4 * 2 * (ranks - 1) / ranks, 12)
    rest = {name: part for name, part in many.parts.items() if name not in ("attention", "merge")}
    assert rest == {name: part for name, part in one.parts.items() if name != "attention"}


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_an_exchange_sends_less_where_a_token_has_fewer_experts_than_there_are_devices(devices, chosen):
    config = dataclasses.replace(EXPERTS, layers=sparse(MoEConfig(16, chosen, 256)))
    copied, exchanged = (
        prefill(config, 64, tensor_parallel=devices, share=Share(experts=how)) for how in ("replicated", "all-to-all")
    )
    sent = [sum(part.sent for part in cost.parts.values()) for cost in (copied, exchanged)]
    assert (sent[1] < sent[0]) == (chosen < devices)
    assert (sent[1] == sent[0]) == (chosen == devices)
    # Each device has 64 / n tokens, sends them to so many experts, of which it holds one in n, and back.
    there_and_back = 2 * 64 / devices * chosen * HIDDEN * (devices - 1) / devices
    assert exchanged.parts["all-to-all"].sent == there_and_back
    assert copied.flops == exchanged.flops


def test_replicas_have_a_part_of_the_batch():
    assert decode_on(DEEP, Mesh(tensor=2, replicas=4), 32, 300) == decode_on(DEEP, Mesh(tensor=2), 8, 300)


def test_a_device_of_a_pipe_holds_its_layers_with_embedding_and_head():
    one = plan_memory(DEEP, DATASHEETS["t4"], 4, 400)
    three = plan_memory(DEEP, DATASHEETS["t4"], 4, 400, pipeline_parallel=3)
    tables = 2 * 512 * 512 * 2 + 512 * 2  # embedding, head and last norm
    assert three.weights - tables == (one.weights - tables) / 3
    assert three.per_token == one.per_token / 3


def test_ranks_hold_pages_in_turn():
    """Of 25 pages and, in window layers, of at most 9: 100 - 1 tokens before, 28 at once, 16 in a page."""
    page = 3 * 16 * 2 * 4 * 64 * 2
    arguments = DEEP, DATASHEETS["t4"], 1, 400
    one, four = (plan_memory(*arguments, chunk=28, context_parallel=ranks) for ranks in (1, 4))
    assert (one.per_sequence, four.per_sequence) == ((25 + 9) * page, (7 + 3) * page)
    assert four.per_token == one.per_token / 4
    assert four.weights == one.weights
    assert four.activations == plan_memory(*arguments, chunk=7).activations  # each has a part of a chunk


def test_the_tightest_stage_counts():
    uneven = dataclasses.replace(DEEP, layers=windowed(100, 100, 100, None, None, None))
    last = dataclasses.replace(DEEP, layers=windowed(None, None, None))
    found = plan_memory(uneven, DATASHEETS["t4"], 4, 1000, chunk=28, pipeline_parallel=2)
    assert found == plan_memory(last, DATASHEETS["t4"], 4, 1000, chunk=28)
    assert [stage.num_layers for stage in stages(uneven, 2)] == [3, 3]


def test_meshes_are_all_ways_to_factor_the_devices():
    found = list(meshes(64))
    assert all(mesh.devices == 64 for mesh in found)
    assert len(set(found)) == len(found) == comb(6 + 3, 3)  # six factors of 2 on four axes
    assert [str(mesh) for mesh in meshes(2)] == ["replicas 2", "context 2", "tensor 2", "pipe 2"]
    assert str(Mesh()) == "one device"
    assert str(Mesh(2, 4, 1, 10)) == "pipe 2 x tensor 4 x replicas 10"


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (Mesh(pipe=4), "pipeline_parallel is 4; it must divide num_layers 6"),
        (Mesh(tensor=3), "tensor_parallel is 3; it must divide vocab_size 512"),
        (Mesh(context=0), "context_parallel is 0; it must be at least 1"),
        (Mesh(replicas=-1), "data_parallel is -1; it must be at least 1"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused(mesh, message):
    with pytest.raises(ValueError, match=message):
        check_mesh(DEEP, mesh)


def test_counts_that_no_step_has_are_refused():
    with pytest.raises(ValueError, match=r"batch is 2; it must be at least 4, a sequence for each replica"):
        decode_on(DEEP, Mesh(replicas=4), 2, 300)
    with pytest.raises(ValueError, match=r"microbatches is 5; it must be in 1\.\.4, the sequences of a replica"):
        decode_on(DEEP, Mesh(pipe=2, replicas=2), 8, 300, microbatches=5)

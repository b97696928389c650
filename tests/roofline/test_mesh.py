"""What a mesh does to steps and memory: every axis against the whole model, or against a count by hand."""

import dataclasses
from collections import Counter
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.engine.memory import weight_bytes
from jaxinfer.model import Model
from jaxinfer.model.config import MoEConfig
from jaxinfer.parallel import make_mesh
from jaxinfer.parallel import pipeline as parallel
from jaxinfer.roofline.cost import Cost, Work
from jaxinfer.roofline.hardware import DATASHEETS, MEASURED
from jaxinfer.roofline.memory import plan_memory
from jaxinfer.roofline.mesh import Mesh, Share, check_mesh, meshes
from jaxinfer.roofline.pipeline import STEPS, Pipeline, circulating, decode_on, draining, prefill_on
from jaxinfer.roofline.step import APART, decode_step, prefill
from tests.roofline.small import small, sparse, windowed

H200 = MEASURED["h200-measured"]
DEEP = small(layers=windowed(None, 100, None, 100, None, 100), num_kv_heads=4, hidden_size=512)
EXPERTS = dataclasses.replace(DEEP, layers=sparse(MoEConfig(16, 2, 256)))
FOUR_STAGES = dataclasses.replace(DEEP, layers=windowed(*[None, 100] * 4))
LONG = dataclasses.replace(DEEP, context=4096)
HIDDEN = 512 * 2  # bytes of a token


def read(seconds: float) -> Cost:
    """Of so many seconds of memory."""
    return Cost({"read": Work(weights=seconds * H200.bandwidth)}, 1)


def pipeline(stages: int, seconds: list[float], circulates: bool = False, apart: float = 0.0) -> Pipeline:
    """Micro-batches that take a stage so many seconds each."""
    return Pipeline(stages, tuple(map(read, seconds)), read(apart), circulates, len(seconds))


def simulate(stages: int, seconds: list[float]) -> float:
    """A clock that all stages share, with one micro-batch at most in each."""
    places, clock, waiting = [None] * stages, 0.0, list(range(len(seconds)))
    while waiting or any(place is not None for place in places[:-1]):
        places = [waiting.pop(0) if waiting else None, *places[:-1]]
        clock += max(seconds[batch] for batch in places if batch is not None)
    return clock


times = st.integers(1, 9).map(float)


@given(st.integers(1, 4), st.lists(times, min_size=1), st.integers(0, 3).map(float))
def test_a_pipe_that_drains_takes_the_ticks_of_a_simulation(stages, seconds, apart):
    assert pipeline(stages, seconds, apart=apart).limit(H200) == pytest.approx(simulate(stages, seconds) + apart)


@given(st.integers(1, 4), times, st.integers(1, 6))
def test_a_pipe_that_circulates_takes_what_another_step_adds(stages, each, microbatches):
    """Steps follow each other once the first micro-batch has left the last stage."""
    own, idle = [each] * microbatches, [0.0] * (max(microbatches, stages) - microbatches)
    steps = [(own + idle) * count for count in (3, 4)]
    found = pipeline(stages, own, circulates=True)
    assert found.limit(H200) == pytest.approx(simulate(stages, steps[1]) - simulate(stages, steps[0]))
    assert found.limit(H200) <= found.predict(H200) * (1 + 1e-9)
    program = (own + idle) * (STEPS - 1) + own
    assert found.predict(H200) == pytest.approx(simulate(stages, program) / STEPS)


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (1, 4), (2, 2), (4, 1), (4, 8)])
def test_the_bubble_is_the_time_that_stages_idle(stages, microbatches):
    found = pipeline(stages, [1.0] * microbatches)
    assert found.bubble == pytest.approx(1 - microbatches / found.limit(H200))
    circulating = pipeline(stages, [1.0] * microbatches, circulates=True)
    assert circulating.bubble == pytest.approx(1 - microbatches / circulating.predict(H200))


@given(st.integers(0, 12).map(lambda shift: 1 << shift), st.integers(2, 9), st.integers(1, 64))
def test_micro_batches_are_those_of_the_engine(rows, stages, parts):
    assert draining(rows, parts, stages) == parallel.microbatches(rows, parts, stages)
    assert circulating(rows, stages) == parallel.Round.of(rows, stages, 1).microbatches


def totals(costs) -> dict[tuple[str, str], float]:
    added: Counter = Counter()
    for name, part in (item for cost in costs for item in cost.parts.items()):
        for field in ("flops", "bytes", "sent", "messages"):
            added[name, field] += getattr(part, field)
    return dict(added)


@pytest.mark.parametrize("config", [DEEP, EXPERTS], ids=["dense", "experts"])
def test_stages_add_up_to_the_model(config):
    """But for the vocabulary, of which each device has a part, and what a pipe sends."""
    mesh, config = Mesh(pipe=3 if config is DEEP else 1, tensor=2), dataclasses.replace(config, vocab_size=516)
    whole = decode_step(config, 8, 300, tensor_parallel=2)
    (tick,) = decode_on(config, mesh, 8, 300, microbatches=1).grid
    layers = totals([whole.without(*APART)])
    found = totals([tick.without(*APART, "hand-over")])
    assert {key: mesh.pipe * value for key, value in found.items()} == pytest.approx(layers)
    head, alone = tick.parts["head"], whole.parts["head"]
    assert (head.flops, head.weights) == (alone.flops / mesh.pipe, alone.weights / mesh.pipe)


def test_what_a_pipe_sends():
    """Of each micro-batch, of two sequences: two all-reduces a layer, one of the embedding over all devices, and what
    leaves a stage, which from the last one reaches all four in two rounds."""
    found, array = decode_on(FOUR_STAGES, Mesh(pipe=4, tensor=2), 8, 300), 2 * HIDDEN
    sent = {
        name: (sum(work.sent for work in works), sum(work.messages for work in works))
        for name, works in found.collectives().items()
    }
    assert sent == {
        "all-reduce": (4 * 4 * array, 4 * 4),
        "look-up": (4 * 2 * array * 7 / 8, 4),
        "hand-over": (4 * array, 4),
        "broadcast": (4 * 2 * array, 4 * 2),
    }


def test_a_vocabulary_that_all_do_not_divide_is_shared_by_a_stage():
    odd = dataclasses.replace(FOUR_STAGES, vocab_size=514)
    head, alone = (decode_on(odd, Mesh(*sizes), 8, 300).grid[0].parts["head"] for sizes in ((4, 2), (1, 2)))
    assert head.weights == alone.weights
    one, four = (plan_memory(odd, DATASHEETS["t4"], 4, 400, pipeline_parallel=pipe) for pipe in (1, 4))
    tables = 2 * 514 * 512 * 2 + 512 * 2
    assert four.weights - tables == (one.weights - tables) / 4


def test_a_prompt_goes_through_a_pipe_in_micro_batches_of_one_step():
    found = prefill_on(LONG, Mesh(pipe=3), 1000)
    assert [cost.tokens for cost in found.grid] == [250] * 4
    whole = prefill(LONG, 1000)
    # Without a pipe one row is finished in the last layer, with it all are.
    for part, last in {"mlp": "last mlp", "projections": "last output", "attention": None}.items():
        expected = whole.parts[part].flops + (1000 * whole.parts[last].flops if last else 0)
        assert totals(found.grid)[part, "flops"] == pytest.approx(expected / 3)
    assert found.apart.parts["embedding"] == whole.parts["embedding"]
    assert not {"embedding", "head"} & found.grid[0].parts.keys()
    assert prefill_on(LONG, Mesh(), 1000).grid == (whole,)


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


def test_a_chunk_sends_its_keys_around_and_its_queries_to_those_before():
    chunk = prefill(DEEP, 50, cached=350, share=Share(2)).parts["attention"]
    keys, queries = 6 * 50 * 2 * 4 * 64 * 2, 6 * 50 * 8 * (64 * (2 + 4) + 4)  # with what they found, in float32
    assert chunk.sent == keys / 2 + queries
    assert chunk.messages == 6 * (1 + 2)


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
    """In a layer that all tokens leave: the last one exchanges nothing."""
    config = dataclasses.replace(EXPERTS, layers=sparse(MoEConfig(16, chosen, 256))[::-1])
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


@pytest.mark.parametrize(("pipe", "tensor"), [(2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("vocabulary", [512, 508])
def test_a_device_of_a_pipe_holds_what_the_model_gives_it(pipe, tensor, vocabulary):
    config = dataclasses.replace(FOUR_STAGES, vocab_size=vocabulary)
    found = plan_memory(config, DATASHEETS["t4"], 4, 400, tensor_parallel=tensor, pipeline_parallel=pipe)
    assert found.weights == weight_bytes(Model(config, make_mesh(tensor, pipe)).parameters.values())
    assert found.per_token == plan_memory(config, DATASHEETS["t4"], 4, 400, tensor_parallel=tensor).per_token / pipe


def test_ranks_hold_pages_in_turn():
    """Of 25 pages and, in window layers, of at most 9: 100 - 1 tokens before, 28 at once, 16 in a page."""
    page = 3 * 16 * 2 * 4 * 64 * 2
    arguments = DEEP, DATASHEETS["t4"], 1, 400
    one, four = (plan_memory(*arguments, chunk=28, context_parallel=ranks) for ranks in (1, 4))
    assert (one.per_sequence, four.per_sequence) == ((25 + 9) * page, (7 + 3) * page)
    assert four.per_token == one.per_token / 4
    assert four.weights == one.weights
    assert four.activations == plan_memory(*arguments, chunk=7).activations  # each has a part of a chunk


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
        (Mesh(pipe=2), r"pipeline_parallel is 2; .* but layer 3 is not as layer 0; \[1, 3\] would fit"),
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
        decode_on(DEEP, Mesh(pipe=3, replicas=2), 8, 300, microbatches=5)

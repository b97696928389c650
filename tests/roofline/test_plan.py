"""Plans on a mesh, and the best of them for a goal."""

import dataclasses

import pytest

from jaxinfer.roofline.hardware import DATASHEETS, MEASURED, Messages
from jaxinfer.roofline.mesh import Mesh, meshes
from jaxinfer.roofline.pipeline import decode_on, prefill_on
from jaxinfer.roofline.plan import make_plan, propose
from tests.roofline.small import small, windowed

H200 = MEASURED["h200-measured"]
FOUR = small(layers=windowed(None, None, None, None), num_kv_heads=4)
SLOW_LINKS = dataclasses.replace(H200, interconnect=1.0, messages=Messages(latency=1.0))


def plans(config, machine, devices, batch, context):
    """Of all meshes that can be planned, by mesh."""
    found = {}
    for mesh in meshes(devices):
        if mesh.pipe > 1 and mesh.context > 1:
            continue  # no engine runs on it
        try:
            found[mesh] = make_plan(config, machine, batch or mesh.replicas, context, mesh=mesh)
        except ValueError:
            continue
    return found


@pytest.mark.parametrize("name", ["llama-3-8b", "mixtral-8x7b"])
@pytest.mark.parametrize("batch", [1, 64])
def test_the_best_for_latency_has_the_shortest_step(published, name, batch):
    proposal = propose(published(name), H200, 4, "latency", 1024, batch=batch)
    fitting = {mesh: plan for mesh, plan in plans(published(name), H200, 4, batch, 1024).items() if plan.memory.fits}
    steps = [plan.decode.predict(H200) for plan in proposal.plans]
    assert steps == sorted(steps)
    assert {plan.mesh: plan for plan in proposal.plans} == fitting
    assert steps[0] == min(plan.decode.predict(H200) for plan in fitting.values())


def test_the_best_for_throughput_has_the_most_tokens_of_as_many_sequences_as_fit(published):
    proposal = propose(published("llama-3-8b"), H200, 2, "throughput", 4096)
    assert len(proposal.plans) == 4  # each axis alone
    rates = [plan.expected for plan in proposal.plans]
    assert rates == sorted(rates, reverse=True)
    for plan in proposal.plans:
        own = plan.batch // plan.mesh.replicas
        assert own & (own - 1) == 0  # a power of two
        more = make_plan(published("llama-3-8b"), H200, 2 * plan.batch, 4096, mesh=plan.mesh)
        assert plan.memory.fits
        assert not more.memory.fits


@pytest.mark.parametrize("room", [1.0, 1.25, 1.5, 1.75])
def test_logits_of_many_sequences_take_their_room(room):
    """Here a fifth of what a sequence takes, so that fewer fit than beside the logits of one."""
    machine = dataclasses.replace(H200, memory=room * 1e8)
    proposal = propose(FOUR, machine, 2, "throughput", 16)
    assert len(proposal.plans) == 4
    for plan in proposal.plans:
        assert not make_plan(FOUR, machine, 2 * plan.batch, 16, mesh=plan.mesh).memory.fits


def test_links_decide_between_a_shared_model_and_replicas():
    """The best of four for one sequence is a shared model, unless talking takes longer than it saves."""
    config = small(hidden_size=2048, intermediate_size=8192, num_kv_heads=8)
    fast = dataclasses.replace(H200, messages=Messages(), overhead=0.0)
    assert propose(config, fast, 2, "latency", 512, batch=2).plans[0].mesh == Mesh(tensor=2)
    assert propose(config, SLOW_LINKS, 2, "latency", 512, batch=2).plans[0].mesh == Mesh(replicas=2)


def test_every_mesh_is_among_the_plans_or_has_its_reason(published):
    config = published("llama-3-70b")
    proposal = propose(config, H200, 8, "throughput", 4096)
    found = [plan.mesh for plan in (*proposal.plans, *proposal.too_large)]
    found += [mesh for refused in proposal.refused.values() for mesh in refused]
    assert sorted(found, key=str) == sorted(meshes(8), key=str)
    assert {plan.mesh for plan in proposal.too_large} == {
        Mesh(context=8), Mesh(context=4, replicas=2), Mesh(context=2, replicas=4), Mesh(replicas=8),
    }  # fmt: skip
    both = proposal.refused["engines have no pipe whose stages share sequences"]
    assert both == [mesh for mesh in meshes(8) if mesh.pipe > 1 and mesh.context > 1]
    three = propose(config, H200, 3, "latency", 4096)
    assert three.refused["pipeline_parallel is 3; it must divide num_layers 80"] == [Mesh(pipe=3)]


def test_none_fits_where_the_weights_are_too_large_for_all_devices(published):
    proposal = propose(published("llama-3-70b"), DATASHEETS["l4"], 4, "latency", 1024)
    assert proposal.plans == []
    missing = [plan.memory.per_sequence - plan.memory.cache for plan in proposal.too_large]
    assert missing == sorted(missing)
    assert missing[0] > 0


def test_replicas_bring_what_each_of_them_brings(published):
    one, two = (make_plan(published("llama-3-8b"), H200, 64 * n, 1024, mesh=Mesh(replicas=n)) for n in (1, 2))
    assert two.expected == 2 * one.expected
    assert two.fastest == 2 * one.fastest
    assert (two.memory, two.decode, two.prefill) == (one.memory, one.decode, one.prefill)


def test_experts_are_reached_in_the_quicker_way(published):
    config, mesh = published("mixtral-8x7b"), Mesh(tensor=8)
    plan = make_plan(config, H200, 8, 8192, mesh=mesh)
    assert plan.decode == decode_on(config, mesh, 8, 8192, experts="replicated")  # fewer messages
    assert plan.prefill == prefill_on(config, mesh, 8192, experts="all-to-all")  # fewer bytes
    for chosen, other in (
        (plan.decode, decode_on(config, mesh, 8, 8192, experts="all-to-all")),
        (plan.prefill, prefill_on(config, mesh, 8192, experts="replicated")),
    ):
        assert chosen.predict(H200) < other.predict(H200)


def test_a_replica_stays_within_the_devices_that_are_linked():
    with pytest.raises(ValueError, match=r"a replica has 16 devices; h200-measured joins 8 by its interconnect"):
        make_plan(FOUR, H200, 2, 512, mesh=Mesh(pipe=4, tensor=4, replicas=2))
    make_plan(FOUR, H200, 4, 512, mesh=Mesh(tensor=4, replicas=4))


def test_what_is_wrong_with_every_mesh_is_an_error():
    for devices, message in (
        (4, "context is 2000; the model was made for at most 1024"),
        (0, "devices is 0; it must"),
    ):
        with pytest.raises(ValueError, match=message):
            propose(FOUR, H200, devices, "latency", 2000)

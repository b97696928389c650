"""A plan in tables and in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Column, Table

from jaxinfer.cli.units import si
from jaxinfer.roofline import Cost, Goal, Hardware, MemoryPlan, Mesh, Plan, Proposal, parameters
from jaxinfer.roofline.pipeline import STEPS

if TYPE_CHECKING:
    from jaxinfer.model import ModelConfig

_SHOWN = 5  # meshes of a proposal
_FIGURES = ("sequences", "weights", "cache left", "ms a step", "tokens/s", "first token", "bubble", "sent a step")
_COLLECTIVES = {
    "all-reduce": "all-reduces of tensor parallelism",
    "last all-reduce": "the same of rows that have logits",
    "all-to-all": "all-to-alls of experts",
    "attention": "ring of keys and values",
    "merge": "merge of parts of the context",
    "hand-over": "to the next stage",
    "look-up": "all-reduce of the embedding",
    "broadcast": "from the last stage to all",
}


def plan_tables(plan: Plan) -> list[Table]:
    """The machine, the memory, the two steps and what devices send each other, as tables for rich."""
    batch, chunk = plan.decode.grid[0].tokens, plan.prefill.grid[0].tokens
    stage = "" if plan.mesh.pipe == 1 else ", a stage"
    decode = f"Decode step: {batch:,} x 1 token, context {plan.memory.context:,}{stage}"
    tables = [
        _machine_table(plan),
        _memory_table(plan),
        _step_table(decode, plan.decode.slowest(plan.hardware), plan.hardware),
        _step_table(f"Prefill: 1 x {chunk:,} tokens{stage}", plan.prefill.slowest(plan.hardware), plan.hardware),
    ]
    if plan.prefill.apart.parts:
        name = f"Of all {plan.prefill.tokens:,} tokens, outside the pipe"
        tables.append(_step_table(name, plan.prefill.apart, plan.hardware))
    return tables if plan.mesh.devices == plan.mesh.replicas else [*tables, _collectives_table(plan)]


def verdict(plan: Plan) -> list[str]:
    """The plan in sentences: whether it fits, how fast it can be, and what holds it back."""
    memory, decode, first, hardware = plan.memory, plan.decode, plan.prefill, plan.hardware
    limit, first_limit = decode.limit(hardware), first.limit(hardware)
    within = "" if plan.mesh.replicas == 1 else f" in each of {plan.mesh.replicas} replicas"
    micro = "batch" if plan.mesh.pipe == 1 else "micro-batch"
    lines = [
        f"Cache of {memory.batch:,} x {memory.context:,} tokens{within}: "
        f"{si(memory.batch * memory.per_sequence, 'B')} needed, {_left(memory)}. "
        f"{memory.sequences:,} x {memory.context:,} fit: {'yes' if memory.fits else '[bold red]no[/]'}.",
        f"Decode: at most {_speed(plan.fastest, limit)}, bound by {decode.slowest(hardware).bound(hardware)}.",
        f"First token: after {si(first_limit, 's')} at the least, bound by {first.slowest(hardware).bound(hardware)}.",
        f"Decoding turns compute bound at {_batch(micro, plan.turning_point(1))} with a short context and at "
        f"{_batch(micro, plan.turning_point(memory.context))} with {memory.context:,} tokens.",
    ]
    if plan.mesh.pipe > 1:
        lines.append(_bubbles(plan))
    if hardware.overhead:
        lines.append(
            f"With {si(hardware.overhead, 's')} for each kernel, decode is expected at "
            f"{_speed(plan.expected, decode.predict(hardware))} "
            f"and the first token after {si(first.predict(hardware), 's')}."
        )
    return lines


def proposal_tables(proposal: Proposal, devices: int, goal: Goal) -> list[Table]:
    """The best meshes for the goal, and why the others are none. The best are columns: so their figures fit into 80
    characters."""
    shown = proposal.plans[:_SHOWN]
    best = Table(Column("mesh", no_wrap=True), title=f"Best for {goal} on {devices} devices")
    for plan in shown:
        best.add_column(str(plan.mesh).replace(" x ", "\n"), justify="right")
    for name, *figures in zip(_FIGURES, *map(_candidate, shown), strict=True):
        best.add_row(name, *figures)
    others = Table("mesh", "why not", title="What does not fit")
    reasons: dict[str, list[Mesh]] = {}
    for plan in proposal.too_large:
        reasons.setdefault(_lacking(plan.memory), []).append(plan.mesh)
    for reason, meshes in (reasons | proposal.refused).items():
        others.add_row(_listed(meshes), reason)
    return [table for table, rows in ((best, shown), (others, others.rows)) if rows]


def proposal_verdict(proposal: Proposal, devices: int, goal: Goal) -> list[str]:
    """The best mesh in a sentence, and the options that plan it; or that there is none, and what comes nearest."""
    if proposal.plans:
        plan, count = proposal.plans[0], len(proposal.plans)
        what = f"{count} {'mesh fits' if count == 1 else 'meshes fit'}"
        lacking = "" if plan.hardware.overhead else " (no constants of kernels and messages, which a datasheet lacks)"
        return [f"{what}; the best for {goal} is {plan.mesh}{lacking}:", _options(plan)]
    nearest = f"; nearest is {proposal.too_large[0].mesh}: {_too_large(proposal.too_large[0])}"
    return [f"[bold red]No mesh of {devices} fits[/]{nearest if proposal.too_large else ''}."]


def _options(plan: Plan) -> str:
    mesh = plan.mesh
    sizes = {
        "tensor": mesh.tensor,
        "pipeline": mesh.pipe,
        "context": mesh.context,
        "data": mesh.replicas,
    }
    return " ".join(
        [*(f"--{axis}-parallel-size {size}" for axis, size in sizes.items() if size > 1), f"--batch {plan.batch}"]
    )


def _candidate(plan: Plan) -> list[str]:
    """What `_FIGURES` names."""
    hardware = plan.hardware
    return [
        f"{plan.batch:,}",
        si(plan.memory.weights, "B"),
        si(plan.memory.cache, "B"),
        f"{plan.decode.predict(hardware) * 1e3:.3g}",
        f"{plan.expected:,.0f}",
        si(plan.prefill.predict(hardware), "s"),
        f"{plan.decode.bubble:.0%}",
        si(sum(work.sent for works in plan.decode.collectives().values() for work in works), "B"),
    ]


def _lacking(memory: MemoryPlan) -> str:
    """What does not fit, in words that are the same for meshes that it is the same for."""
    if memory.cache < 0:
        room = si(memory.memory - memory.reserved, "B")
        return f"{si(memory.weights, 'B')} of weights, beside activations, of {room} that there are"
    needed = si(memory.batch * memory.per_sequence, "B")
    return f"{needed} of cache needed, {_left(memory)} beside {si(memory.weights, 'B')} of weights"


def _too_large(plan: Plan) -> str:
    memory = plan.memory
    needed = si(memory.batch * memory.per_sequence, "B")
    return f"{si(memory.weights, 'B')} of weights; {needed} of cache needed, {_left(memory)}"


def _listed(meshes: list[Mesh]) -> str:
    shown = ", ".join(str(mesh) for mesh in meshes[:_SHOWN])
    return shown if len(meshes) <= _SHOWN else f"{shown} and {len(meshes) - _SHOWN} more"


def _bubbles(plan: Plan) -> str:
    decode, first = plan.decode, plan.prefill
    return (
        f"Pipe of {plan.mesh.pipe} stages: {decode.microbatches} micro-batches of a decode step leave a bubble of "
        f"{decode.bubble:.0%} where it drains after {STEPS} steps, {first.microbatches} of a prompt one of "
        f"{first.bubble:.0%}."
    )


def _left(memory: MemoryPlan) -> str:
    if memory.cache >= 0:
        return f"{si(memory.cache, 'B')} left"
    return f"none left, for weights and activations alone are {si(-memory.cache, 'B')} too large"


def _speed(rate: float, seconds: float) -> str:
    return f"{rate:,.0f} tokens/s ({si(seconds, 's')} a step)"


def _batch(kind: str, batch: int | None) -> str:
    return f"no {kind}" if batch is None else f"a {kind} of {batch:,}"


def _machine_table(plan: Plan) -> Table:
    config, hardware, precision = plan.config, plan.hardware, plan.precision
    rate = hardware.rate(precision.activations)
    table = Table("", "", title=f"{config.architecture} on {hardware.name}", show_header=False)
    table.add_row("parameters", f"{parameters(config):,}")
    table.add_row("layers, hidden size", f"{config.num_layers}, {config.hidden_size:,}")
    table.add_row("query heads, KV heads, head size", _heads(config))
    table.add_row("weights, cache, matmuls", f"{precision.weights}, {precision.cache}, {precision.activations}")
    table.add_row("devices", str(plan.mesh.devices) if plan.mesh.devices == 1 else f"{plan.mesh.devices}: {plan.mesh}")
    table.add_row("matmul, memory", f"{si(rate, 'FLOP/s')}, {si(hardware.bandwidth, 'B/s')}")
    table.add_row("balance", f"{hardware.balance(precision.activations):.0f} FLOP/byte")
    return table


def _heads(config: ModelConfig) -> str:
    return f"{config.num_heads}, {config.num_kv_heads}, {config.head_size}"


def _memory_table(plan: Plan) -> Table:
    memory = plan.memory
    table = Table("", "size", "share", title="Memory of one device")
    rows = {
        "device": memory.memory,
        "runtime and fragmentation": memory.reserved,
        "weights": memory.weights,
        "activations": memory.activations,
        "left for the cache": memory.cache,
        "cache of one sequence": memory.per_sequence,
        "cache of one token": memory.per_token,
    }
    for name, size in rows.items():
        table.add_row(name, si(size, "B"), f"{size / memory.memory:.1%}")
    return table


def _collectives_table(plan: Plan) -> Table:
    table = Table("collective", title="Sent by a device")
    for column in ("step", "bytes", "messages", "at least", "with the messages' latency"):
        table.add_column(column, justify="right")
    hardware, steps = plan.hardware, {"decode": plan.decode, "prefill": plan.prefill}
    for step, pipeline in steps.items():
        for name, works in pipeline.collectives().items():
            sent, messages = sum(work.sent for work in works), sum(work.messages for work in works)
            seconds, waiting = sent / hardware.interconnect, sum(work.waiting(hardware) for work in works)
            total = si(seconds + waiting, "s") if waiting else ""
            table.add_row(_COLLECTIVES[name], step, si(sent, "B"), f"{messages:,}", si(seconds, "s"), total)
    return table


def _step_table(title: str, cost: Cost, hardware: Hardware) -> Table:
    table = Table("part", title=title)
    for column in ("work", "traffic", "FLOP/byte", "at least", "bound"):
        table.add_column(column, justify="right")
    for name, part in cost.parts.items():
        table.add_row(
            name,
            si(part.flops, "FLOP"),
            si(part.bytes or part.sent, "B"),
            f"{part.intensity:.1f}",
            si(part.limit(hardware), "s"),
            part.bound(hardware),
        )
    table.add_section()
    table.add_row(
        "all, what is sent meanwhile" if any(part.sent for part in cost.parts.values()) else "all",
        si(cost.flops, "FLOP"),
        si(cost.bytes, "B"),
        f"{cost.intensity:.1f}",
        si(cost.limit(hardware), "s"),
        cost.bound(hardware),
    )
    return table

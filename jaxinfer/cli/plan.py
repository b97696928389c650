"""`jaxinfer plan`: does the model fit the machine, and how fast can it be there?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from jaxinfer.cli.options import integer
from jaxinfer.cli.units import si
from jaxinfer.roofline import (
    Attention,
    Cost,
    Hardware,
    MemoryPlan,
    Precision,
    compute_bound_batch,
    decode_step,
    find_hardware,
    parameters,
    plan_memory,
    prefill,
)
from jaxinfer.roofline.plot import plot_roofline
from jaxinfer.roofline.precision import BITS

if TYPE_CHECKING:
    from jaxinfer.model import ModelConfig

_PACKAGE = Path(__file__).parents[1]
# A wheel carries the configs inside the package.
MODELS = next(
    folder for folder in (_PACKAGE / "assets" / "models", _PACKAGE.parent / "configs" / "models") if folder.is_dir()
)


def plan(
    model: Annotated[str, typer.Argument(help="Folder, config.json, name in configs/models or Hugging Face id.")],
    hardware: Annotated[
        str, typer.Option(help="h200, a100-80, tpu-v5e, ...; h200-measured; here measures this machine.")
    ] = "h200",
    batch: Annotated[int, integer(least=1, help="Sequences that decode together.")] = 1,
    context: Annotated[int, integer(least=1, help="Tokens in each sequence.")] = 4096,
    weights: Annotated[str, typer.Option(help="Dtype of the weights: bf16, fp8, int8, int4, ...")] = "bf16",
    cache: Annotated[str, typer.Option(help="Dtype of keys and values: bf16, int8, fp8, ...")] = "bf16",
    activations: Annotated[
        str | None, typer.Option(help="Dtype of the matmuls' operands; by default 16 bits or the weights'.")
    ] = None,
    attention: Annotated[
        Attention, typer.Option(help="flash, or materialized as XLA's is, of a row of pages of --context tokens.")
    ] = "flash",
    tensor_parallel: Annotated[int, integer(least=1, help="Devices that share the model.")] = 1,
    plot: Annotated[Path | None, typer.Option(help="Save the roofline as an image.")] = None,
) -> None:
    """Print memory, limits and bounds of MODEL on a machine; exit with 1 if it does not fit."""
    from jaxinfer.machine import measure_machine

    try:
        config, precision = find_model(model), Precision(weights, cache, activations or _operands(weights))
        machine = measure_machine() if hardware == "here" else find_hardware(hardware)
        made = make_plan(config, machine, batch, context, precision, tensor_parallel, attention)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    if plot:
        _save_plot(made, plot)
    console = Console()
    for table in plan_tables(made):
        console.print(table)
    console.print(*verdict(made), sep="\n")
    if not made.memory.fits:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Plan:
    """A model on a machine: what it holds there and what its steps cost."""

    config: ModelConfig
    hardware: Hardware
    precision: Precision
    tensor_parallel: int
    memory: MemoryPlan
    decode: Cost
    prefill: Cost
    turning_point: int | None  # batch at which decoding at this context turns compute bound
    short_turning_point: int | None  # the same with next to no context


def find_model(model: str) -> ModelConfig:
    """The description of a model by folder, file, name in configs/models or Hugging Face id.

    Raises:
        ValueError: nothing of that name is found, or its config.json cannot be read; the message says why.
    """
    from huggingface_hub import hf_hub_download

    from jaxinfer.model import read_config

    if Path(model).exists():
        return read_config(Path(model))
    if (MODELS / model / "config.json").is_file():
        return read_config(MODELS / model)
    if model.count("/") != 1:
        names = ", ".join(sorted(folder.name for folder in MODELS.glob("*/")))
        raise ValueError(f"model is {model!r}; expected a folder, a file, a Hugging Face id or one of {names}")
    try:
        return read_config(hf_hub_download(model, "config.json"))
    except OSError as error:
        raise ValueError(f"no config.json of {model!r} from Hugging Face: {error}") from error


def make_plan(
    config: ModelConfig,
    hardware: Hardware,
    batch: int,
    context: int,
    precision: Precision,
    tensor_parallel: int = 1,
    attention: Attention = "flash",
) -> Plan:
    """Plans decoding of `batch` sequences of `context` tokens, and the prefill of one prompt as long.

    Raises:
        ValueError: a count is out of its range, or the machine has no matmul of a dtype that is needed; the message
            says which options give one that it has.
    """
    _check_matmuls(hardware, precision)
    if context > config.context:
        raise ValueError(f"context is {context}; the model was made for at most {config.context}")
    return Plan(
        config,
        hardware,
        precision,
        tensor_parallel,
        memory=plan_memory(config, hardware, batch, context, precision, tensor_parallel),
        decode=decode_step(config, batch, context, precision, tensor_parallel, attention=attention),
        prefill=prefill(config, context, precision=precision, tensor_parallel=tensor_parallel, attention=attention),
        turning_point=compute_bound_batch(config, context, hardware, precision, tensor_parallel, attention),
        short_turning_point=compute_bound_batch(config, 1, hardware, precision, tensor_parallel, attention),
    )


def plan_tables(plan: Plan) -> list[Table]:
    """The machine, the memory and the two steps, as tables for rich."""
    memory = plan.memory
    decode = f"Decode step: {memory.batch} x 1 token, context {memory.context:,}"
    return [
        _machine_table(plan),
        _memory_table(plan),
        _step_table(decode, plan.decode, plan.hardware),
        _step_table(f"Prefill: 1 x {memory.context:,} tokens", plan.prefill, plan.hardware),
    ]


def verdict(plan: Plan) -> list[str]:
    """The plan in sentences: whether it fits, how fast it can be, and what holds it back."""
    memory, decode, first, hardware = plan.memory, plan.decode, plan.prefill, plan.hardware
    lines = [
        f"Cache of {memory.batch:,} x {memory.context:,} tokens: "
        f"{si(memory.batch * memory.per_sequence, 'B')} needed, {_left(memory)}. "
        f"{memory.sequences:,} x {memory.context:,} fit: {'yes' if memory.fits else '[bold red]no[/]'}.",
        f"Decode: at most {_speed(decode.tokens, decode.limit(hardware))}, bound by {decode.bound(hardware)}.",
        f"First token: after {si(first.limit(hardware), 's')} at the least, bound by {first.bound(hardware)}.",
        f"Decoding turns compute bound at {_batch(plan.short_turning_point)} with a short context and at "
        f"{_batch(plan.turning_point)} with {memory.context:,} tokens.",
    ]
    if hardware.overhead:
        expected = _speed(decode.tokens, decode.predict(hardware))
        lines.append(
            f"With {si(hardware.overhead, 's')} for each kernel, decode is expected at {expected} "
            f"and the first token after {si(first.predict(hardware), 's')}."
        )
    return lines


def _save_plot(plan: Plan, path: Path) -> None:
    """Draws both steps on the machine's roofline; the format is that of the path's suffix."""
    steps = {"decode": plan.decode, "prefill": plan.prefill}
    try:
        plot_roofline(plan.hardware, steps, plan.precision.activations).savefig(path, dpi=150)
    except ModuleNotFoundError as error:
        raise typer.BadParameter(str(error), param_hint="'--plot'") from error
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise typer.BadParameter(f"cannot write an image to {path}: {reason}", param_hint="'--plot'") from error


def _check_matmuls(hardware: Hardware, precision: Precision) -> None:
    for needed in (precision.activations, precision.residual):
        try:
            hardware.rate(needed)
        except ValueError as error:
            other = next(dtype for dtype in hardware.flops if BITS[dtype] >= 16)
            names = [name for name in ("weights", "cache") if getattr(precision, name) == needed]
            options = " ".join(f"--{name} {other}" for name in (*names, "activations"))
            raise ValueError(f"{error}; pass {options}") from None


def _operands(weights: str) -> str:
    """Matmuls run in the dtype of the weights if that is not a quantized one."""
    return weights if weights in ("fp32", "fp16") else "bf16"


def _left(memory: MemoryPlan) -> str:
    if memory.cache >= 0:
        return f"{si(memory.cache, 'B')} left"
    return f"none left, for weights and activations alone are {si(-memory.cache, 'B')} too large"


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:,.0f} tokens/s ({si(seconds, 's')} a step)"


def _batch(batch: int | None) -> str:
    return "no batch" if batch is None else f"a batch of {batch:,}"


def _machine_table(plan: Plan) -> Table:
    config, hardware, precision = plan.config, plan.hardware, plan.precision
    rate = hardware.rate(precision.activations)
    table = Table("", "", title=f"{config.architecture} on {hardware.name}", show_header=False)
    table.add_row("parameters", f"{parameters(config):,}")
    table.add_row("layers, hidden size", f"{config.num_layers}, {config.hidden_size:,}")
    table.add_row("query heads, KV heads, head size", _heads(config))
    table.add_row("weights, cache, matmuls", f"{precision.weights}, {precision.cache}, {precision.activations}")
    table.add_row("devices", str(plan.tensor_parallel))
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
        "all",
        si(cost.flops, "FLOP"),
        si(cost.bytes, "B"),
        f"{cost.intensity:.1f}",
        si(cost.limit(hardware), "s"),
        cost.bound(hardware),
    )
    return table

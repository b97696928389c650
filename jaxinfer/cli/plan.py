"""`jaxinfer plan`: does the model fit the machine, how fast can it be there, and on which mesh is it best?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jaxinfer.cli.models import find_model
from jaxinfer.cli.options import bad_argument, integer
from jaxinfer.cli.plan_tables import plan_tables, proposal_tables, proposal_verdict, verdict
from jaxinfer.roofline import Attention, Goal, Mesh, Plan, Precision, find_hardware, make_plan, propose
from jaxinfer.roofline.plot import plot_roofline

_MESH = "Mesh"


def plan(
    model: Annotated[str, typer.Argument(help="Folder, config.json, name in configs/models or Hugging Face id.")],
    hardware: Annotated[
        str, typer.Option(help="h200, a100-80, tpu-v5e, ...; h200-measured; here measures this machine.")
    ] = "h200",
    batch: Annotated[
        int | None, integer(least=1, help="Sequences that decode together; 1, or what fits for throughput.")
    ] = None,
    context: Annotated[int, integer(least=1, help="Tokens in each sequence.")] = 4096,
    weights: Annotated[str, typer.Option(help="Dtype of the weights: bf16, fp8, int8, int4, ...")] = "bf16",
    cache: Annotated[str, typer.Option(help="Dtype of keys and values: bf16, int8, fp8, ...")] = "bf16",
    activations: Annotated[
        str | None, typer.Option(help="Dtype of the matmuls' operands; by default 16 bits or the weights'.")
    ] = None,
    attention: Annotated[
        Attention, typer.Option(help="flash, or materialized as XLA's is, of a row of pages of --context tokens.")
    ] = "flash",
    tensor_parallel_size: Annotated[
        int | None,
        integer(
            "--tensor-parallel-size",
            "--tensor-parallel",
            least=1,
            help="Devices that share every layer.",
            rich_help_panel=_MESH,
        ),
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None, integer(least=1, help="Stages of layers.", rich_help_panel=_MESH)
    ] = None,
    context_parallel_size: Annotated[
        int | None, integer(least=1, help="Devices that share every sequence.", rich_help_panel=_MESH)
    ] = None,
    data_parallel_size: Annotated[
        int | None, integer(least=1, help="Engines with a model each; they share the batch.", rich_help_panel=_MESH)
    ] = None,
    microbatches: Annotated[
        int | None, integer(least=1, help="Parts of the batch in a pipe; one for each stage.", rich_help_panel=_MESH)
    ] = None,
    goal: Annotated[
        Goal | None, typer.Option(help="Propose the best mesh of --devices for it.", rich_help_panel=_MESH)
    ] = None,
    devices: Annotated[int | None, integer(least=1, help="Of the proposal.", rich_help_panel=_MESH)] = None,
    plot: Annotated[Path | None, typer.Option(help="Save the roofline as an image.")] = None,
) -> None:
    """Print memory, limits and bounds of MODEL on a machine; exit with 1 if it does not fit."""
    from jaxinfer.machine import measure_machine

    axes = {
        "--pipeline-parallel-size": pipeline_parallel_size, "--tensor-parallel-size": tensor_parallel_size,
        "--context-parallel-size": context_parallel_size, "--data-parallel-size": data_parallel_size,
    }  # fmt: skip
    _check_together(goal, devices, axes | {"--microbatches": microbatches, "--plot": plot})
    console = Console()
    try:
        config, precision = find_model(model), Precision(weights, cache, activations or _operands(weights))
        machine = measure_machine() if hardware == "here" else find_hardware(hardware)
        if goal is not None and devices is not None:
            proposal = propose(config, machine, devices, goal, context, precision, batch, attention)
            tables, lines = proposal_tables(proposal, devices, goal), proposal_verdict(proposal, devices, goal)
            fits = bool(proposal.plans)
        else:
            mesh = Mesh(*(size or 1 for size in axes.values()))
            made = make_plan(config, machine, batch or 1, context, precision, mesh, attention, microbatches)
            tables, lines, fits = plan_tables(made), verdict(made), made.memory.fits
            if plot:
                _save_plot(made, plot)
    except (ValueError, OSError) as error:
        raise bad_argument(error) from error
    for table in tables:
        console.print(table)
    console.print(*lines, sep="\n")
    if not fits:
        raise typer.Exit(1)


def _check_together(goal: Goal | None, devices: int | None, others: Mapping[str, object]) -> None:
    """A proposal has a goal and devices, and makes the mesh itself."""
    if (goal is None) != (devices is None):
        raise typer.BadParameter("--goal and --devices belong together; give both")
    given = [name for name, value in others.items() if value is not None]
    if goal is not None and given:
        raise typer.BadParameter(f"--goal proposes the mesh; leave out {', '.join(given)}")


def _save_plot(plan: Plan, path: Path) -> None:
    """Draws both steps on the machine's roofline; the format is that of the path's suffix."""
    steps = {"decode": plan.decode.slowest(plan.hardware), "prefill": plan.prefill.slowest(plan.hardware)}
    try:
        plot_roofline(plan.hardware, steps, plan.precision.activations).savefig(path, dpi=150)
    except ModuleNotFoundError as error:
        raise typer.BadParameter(str(error), param_hint="'--plot'") from error
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise typer.BadParameter(f"cannot write an image to {path}: {reason}", param_hint="'--plot'") from error


def _operands(weights: str) -> str:
    """Matmuls run in the dtype of the weights if that is not a quantized one."""
    return weights if weights in ("fp32", "fp16") else "bf16"

"""`jaxinfer train`: what inference needs of training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

train_app = typer.Typer(help="Train the small models that ship with the package.", no_args_is_help=True)


@train_app.callback()
def _group() -> None:
    """Keeps `demo` a subcommand while it is the only one."""


@train_app.command()
def demo(
    output: Annotated[Path, typer.Argument(help="Folder to write; must be absent or empty.")] = Path("demo"),
    steps: Annotated[int, typer.Option(min=1, help="Steps of 32 rows of 1024 tokens.")] = 2400,
    seed: Annotated[int, typer.Option(help="Of the first weights and of the order of the text.")] = 0,
) -> None:
    """Train the demo model: minutes on an H200, about a day on a CPU."""
    from jaxinfer.training.demo import train_demo
    from jaxinfer.training.train import Recipe

    try:
        train_demo(output, Recipe(steps=steps, seed=seed))
    except (ValueError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error

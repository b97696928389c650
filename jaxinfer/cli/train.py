"""`jaxinfer train`: what inference needs of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from jaxinfer.cli.options import integer

if TYPE_CHECKING:
    from jaxinfer.training.student import Objective

train_app = typer.Typer(help="Train what ships with the package, drafts and heads.", no_args_is_help=True)

_Steps = Annotated[int, integer(least=1, help="Steps of training.")]
_Batch = Annotated[int, integer(least=1, help="Rows of a step, of 1024 tokens each.")]
_Generated = Annotated[
    int, integer(least=0, help="Tokens that the model writes, to learn from in the place of the library; 0 for none.")
]
_Seed = Annotated[int, integer(least=0, help="Of the first weights and of the order of the text.")]


@train_app.command()
def demo(
    output: Annotated[Path, typer.Argument(help="Folder of the finished checkpoint; must be absent or empty.")] = Path(
        "demo"
    ),
    steps: Annotated[int, integer(least=1, help="Steps of 32 rows of 1024 tokens.")] = 2400,
    seed: _Seed = 0,
) -> None:
    """Train the demo model: minutes on an H200, about a day on a CPU."""
    from jaxinfer.training.demo import train_demo
    from jaxinfer.training.train import Recipe

    try:
        train_demo(output, Recipe(steps=steps, seed=seed))
    except (ValueError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error


@train_app.command()
def distill(
    output: Annotated[Path, typer.Argument(help="Folder of the finished checkpoint; must be absent or empty.")],
    kind: Annotated[
        str,
        typer.Option(
            help="How far the draft is from the teacher: forward-kl, reverse-kl or jensen-shannon; or cross-entropy, "
            "from the text alone: the same draft without distillation.",
        ),
    ] = "forward-kl",
    teacher: Annotated[
        str | None, typer.Option(help="Folder of a checkpoint or Hugging Face id; the demo model by default.")
    ] = None,
    generated: _Generated = 0,
    layers: Annotated[int, integer(least=1, help="Layers of the draft.")] = 3,
    width: Annotated[int, integer(least=64, help="Hidden size of the draft, a multiple of 64.")] = 320,
    steps: _Steps = 3600,
    batch: _Batch = 32,
    seed: _Seed = 0,
) -> None:
    """Train a draft model for a teacher, for `--speculate draft`: minutes on an H100, most of a day on a CPU."""
    from jaxinfer import checkpoint
    from jaxinfer.llm import DEMO
    from jaxinfer.training.student import train_student
    from jaxinfer.training.train import Recipe

    try:
        # The usual weight decay: a model this small does not learn its text by heart.
        recipe = Recipe(steps=steps, batch=batch, seed=seed, weight_decay=0.1)
        folder = checkpoint.resolve(DEMO if teacher is None else teacher)
        train_student(output, folder, cast("Objective", kind), recipe, layers=layers, width=width, generated=generated)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@train_app.command()
def medusa(
    output: Annotated[Path, typer.Argument(help="Folder of the finished heads; must be absent or empty.")],
    target: Annotated[
        str | None, typer.Option(help="Folder of a checkpoint or Hugging Face id; the demo model by default.")
    ] = None,
    generated: _Generated = 0,
    heads: Annotated[int, integer(least=1, help="Tokens that are guessed after the next.")] = 3,
    steps: _Steps = 1200,
    batch: _Batch = 32,
    seed: Annotated[int, integer(least=0, help="Of the order of the text.")] = 0,
) -> None:
    """Train Medusa heads for a model, for `--speculate medusa`: minutes on an H100, most of a day on a CPU."""
    from jaxinfer.training.medusa import train_heads

    _train_beside(train_heads, output, target, steps, batch, seed, heads=heads, generated=generated)


@train_app.command()
def eagle(
    output: Annotated[Path, typer.Argument(help="Folder of the finished head; must be absent or empty.")],
    target: Annotated[
        str | None, typer.Option(help="Folder of a checkpoint or Hugging Face id; the demo model by default.")
    ] = None,
    generated: _Generated = 0,
    passes: Annotated[int, integer(least=1, help="Tokens that it drafts one after the other in training.")] = 3,
    steps: _Steps = 1200,
    batch: _Batch = 32,
    seed: _Seed = 0,
) -> None:
    """Train a draft head for a model, for `--speculate eagle`: minutes on an H100, most of a day on a CPU."""
    from jaxinfer.training.eagle import train_eagle

    _train_beside(train_eagle, output, target, steps, batch, seed, passes=passes, generated=generated)


def _train_beside(
    train: Callable[..., object], output: Path, target: str | None, steps: int, batch: int, seed: int, **settings: int
) -> None:
    """Trains what is made for one model, which stays as it is."""
    from jaxinfer import checkpoint
    from jaxinfer.llm import DEMO
    from jaxinfer.training.train import Recipe

    try:
        recipe = Recipe(steps=steps, batch=batch, seed=seed, weight_decay=0.1)
        train(output, checkpoint.resolve(DEMO if target is None else target), recipe, **settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error

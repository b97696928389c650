"""`jaxinfer convert`: a Hugging Face checkpoint as our own, which restores under any mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[str, typer.Argument(help="Folder of a Hugging Face checkpoint, or a Hugging Face id.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
) -> None:
    """Write the checkpoint SOURCE in the project's own layout to DESTINATION."""
    from jaxinfer import checkpoint
    from jaxinfer.parallel import make_mesh

    try:
        checkpoint.convert(checkpoint.resolve(source), destination, make_mesh())
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"wrote {destination}")

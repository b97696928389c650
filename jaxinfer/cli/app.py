"""The subcommands, and how an error reaches the terminal: as one sentence, without a traceback.

A command imports what it needs when it runs: JAX takes seconds, and `--help` needs none of it.
"""

from __future__ import annotations

import typer

from jaxinfer.cli.axes import OncePerAxis
from jaxinfer.cli.batch import batch
from jaxinfer.cli.convert import convert
from jaxinfer.cli.doctor import doctor
from jaxinfer.cli.generate import generate
from jaxinfer.cli.plan import plan
from jaxinfer.cli.run import run
from jaxinfer.cli.serve import serve
from jaxinfer.cli.train import train_app
from jaxinfer.logs import shown

app = typer.Typer(help="A full-stack transformer inference engine in JAX.", no_args_is_help=True)


@app.callback()
def start(context: typer.Context) -> None:
    """Before every command: until it ends, what is said of it is shown."""
    context.with_resource(shown())


app.command(cls=OncePerAxis)(generate)
app.command(cls=OncePerAxis)(plan)
app.command(cls=OncePerAxis)(serve)
app.command(cls=OncePerAxis)(batch)
app.command()(run)
app.command()(doctor)
app.command()(convert)
app.add_typer(train_app, name="train")

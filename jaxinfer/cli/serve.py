"""`jaxinfer serve`: an OpenAI-compatible server. This process imports no JAX; the engine has others of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from jaxinfer.cli.hosts import Hosting, hosting
from jaxinfer.cli.loading import MESH, PANEL, loading
from jaxinfer.cli.online import learning, learning_draft
from jaxinfer.cli.options import bad_argument, integer, number
from jaxinfer.cli.serving import Network, engine_options, networking
from jaxinfer.cli.speculation import Speculating, speculating

if TYPE_CHECKING:
    from jaxinfer.serve.messages import Failed, Setup, Warming
    from jaxinfer.serve.server import Settings


@networking
@loading
@engine_options
@learning
@hosting
@speculating
def serve(
    model: Annotated[
        str | None, typer.Argument(help="Folder of a checkpoint or Hugging Face id; the demo model by default.")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name of the model in requests; MODEL by default.")
    ] = None,
    max_waiting: Annotated[
        int, integer(least=0, help="Requests that may wait; more are told to come again later.")
    ] = 256,
    shutdown_timeout: Annotated[float, number(least=0, help="Seconds that running requests have after SIGTERM.")] = 30,
    *,
    network: Network,
    loading: dict[str, Any],
    data_parallel_size: Annotated[
        int, integer(least=1, help="Replicas of the engine, each with devices of its own.", rich_help_panel=PANEL)
    ] = 1,
    engine: dict[str, Any],
    warm_up: Annotated[
        bool, typer.Option(help="Compile everything before the first request.", rich_help_panel=PANEL)
    ] = True,
    speculation: Speculating,
    learning: dict[str, Any],
    hosts: Hosting,
) -> None:
    """Serve MODEL to OpenAI's clients: completions and chats, whole or streamed; SIGTERM ends it in order."""
    try:
        from jaxinfer.serve.messages import Setup
        from jaxinfer.serve.server import Settings
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"{error.name} is not installed: pip install 'jaxinfer[serve]'") from error
    network.check()
    engine |= {"always_speculate": speculation.always, "adaptive_speculation": speculation.adaptive}
    watch = learning_draft(speculation.settings["speculate"], **learning)
    if data_parallel_size > 1:
        hosts.refuse("data_parallel_size", data_parallel_size, "start a group with a coordinator for each replica")
    if watch is not None:
        hosts.refuse("online_draft", True)
    setup = Setup(model, loading, engine, warm_up, speculation.settings, watch, group=hosts.settings)
    name = served_model_name or ("demo" if model is None else model)
    tls = network.ssl_certfile, network.ssl_keyfile
    settings = Settings(name, max_waiting, shutdown_timeout, network.api_key, *tls)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    raise typer.Exit(_run(setup, data_parallel_size, settings, network, console, speculation))


def _run(
    setup: Setup, replicas: int, settings: Settings, network: Network, console: Console, speculation: Speculating
) -> int:
    """Serves with so many replicas of a set-up, until it is told to stop; returns the exit code."""
    from jaxinfer.serve.devices import shares
    from jaxinfer.serve.processes import StartError
    from jaxinfer.serve.server import run

    try:
        own = {name: setup.llm[name] for name in MESH}
        setups = [replace(setup, devices=share) for share in shares(replicas, **own)]
    except ValueError as error:
        raise bad_argument(error) from error
    bound = network.bind()
    speculation.warn(console.print)
    try:
        with bound, WarmUpBar(console) as bar:
            return run(setups, settings, bound, lambda line: console.print(line, markup=False), bar.show)
    except StartError as error:
        _explain(error.failed, setup, console.print)
        return 1


class WarmUpBar:
    """Shows on a terminal how many programs are compiled, until all are."""

    def __init__(self, console: Console):
        self._bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("compiling")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, warming: Warming) -> None:
        self._bar.start()
        self._bar.update(self._task, total=warming.total, advance=1, description=warming.warmed.name)
        if self._bar.finished:
            self._bar.stop()


def _explain(failed: Failed, setup: Setup, say: Callable[[str], None]) -> None:
    """Says why the engine did not start; where memory was short, also what takes it and what would fit."""
    if failed.reason == "input":
        raise bad_argument(failed.message)
    say(f"[bold red]error:[/] {escape(failed.message)}")
    if failed.reason == "memory" and failed.device is not None:
        from jaxinfer.cli.room import memory_lines

        for line in memory_lines(setup, failed.device):
            say(line)

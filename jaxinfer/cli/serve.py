"""`jaxinfer serve`: an OpenAI-compatible server. This process imports no JAX; the engine has others of its own."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Self

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from jaxinfer.cli.online import LEARN, MOST_TEXTS, RATE, STEPS, TEXTS, learning_draft
from jaxinfer.cli.options import bad_argument, integer, number
from jaxinfer.cli.speculation import PANEL, Speculating, speculating

if TYPE_CHECKING:
    from jaxinfer.serve.messages import Failed, Setup, Warming

_ENGINE, _NETWORK = "Engine", "Network"


@speculating
def serve(
    model: Annotated[
        str | None, typer.Argument(help="Folder of a checkpoint or Hugging Face id; the demo model by default.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.", rich_help_panel=_NETWORK)
    ] = "127.0.0.1",
    port: Annotated[
        int, integer(least=0, most=65535, help="0 takes any that is free.", rich_help_panel=_NETWORK)
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="JAXINFER_API_KEY", help="Callers must send it.", rich_help_panel=_NETWORK),
    ] = None,
    ssl_certfile: Annotated[
        str | None, typer.Option(help="PEM file: serves over TLS.", rich_help_panel=_NETWORK)
    ] = None,
    ssl_keyfile: Annotated[str | None, typer.Option(help="PEM file of its key.", rich_help_panel=_NETWORK)] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name of the model in requests; MODEL by default.")
    ] = None,
    max_waiting: Annotated[
        int, integer(least=0, help="Requests that may wait; more are told to come again later.")
    ] = 256,
    shutdown_timeout: Annotated[float, number(least=0, help="Seconds that running requests have after SIGTERM.")] = 30,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; the checkpoint's by default.", rich_help_panel=_ENGINE),
    ] = None,
    max_model_len: Annotated[
        int | None,
        integer(help="Tokens of prompt and output; the checkpoint's by default.", rich_help_panel=_ENGINE),
    ] = None,
    tensor_parallel: Annotated[
        int, integer(least=1, help="Devices that share the model.", rich_help_panel=_ENGINE)
    ] = 1,
    pipeline_parallel_size: Annotated[
        int, integer(least=1, help="Stages of so many devices, for the layers.", rich_help_panel=_ENGINE)
    ] = 1,
    data_parallel_size: Annotated[
        int, integer(least=1, help="Replicas of the engine, each with devices of its own.", rich_help_panel=_ENGINE)
    ] = 1,
    max_num_seqs: Annotated[
        int, integer(help="Sequences that run at once; a power of two.", rich_help_panel=_ENGINE)
    ] = 64,
    max_num_batched_tokens: Annotated[
        int, integer(help="Prompt tokens of one step; a power of two.", rich_help_panel=_ENGINE)
    ] = 1024,
    max_slowdown: Annotated[
        float,
        number(
            least=1, help="Of a decode step by prompts beside it, as predicted; inf for none.", rich_help_panel=_ENGINE
        ),
    ] = 1.75,
    page_size: Annotated[int, integer(help="Tokens of a page of the cache.", rich_help_panel=_ENGINE)] = 16,
    num_pages: Annotated[
        int | None, integer(help="Pages of the cache; as many as fit by default.", rich_help_panel=_ENGINE)
    ] = None,
    steps_per_dispatch: Annotated[
        int, integer(help="Decode steps in one program, and tokens in one event.", rich_help_panel=_ENGINE)
    ] = 8,
    cache_dtype: Annotated[
        str | None,
        typer.Option(
            help="Of keys and values, also int8 or float8_e4m3fn; the model's by default.", rich_help_panel=_ENGINE
        ),
    ] = None,
    prefix_caching: Annotated[
        bool, typer.Option(help="Prompts that begin alike share the pages of it.", rich_help_panel=_ENGINE)
    ] = True,
    max_waiting_time: Annotated[
        float | None, typer.Option(help="Seconds that a request may wait to run.", rich_help_panel=_ENGINE)
    ] = None,
    warm_up: Annotated[
        bool, typer.Option(help="Compile everything before the first request.", rich_help_panel=_ENGINE)
    ] = True,
    *,
    speculation: Speculating,
    online_draft: Annotated[bool, typer.Option("--online-draft", help=LEARN, rich_help_panel=PANEL)] = False,
    online_learning_rate: Annotated[float | None, number(least=1e-9, most=1, help=RATE, rich_help_panel=PANEL)] = None,
    online_interval: Annotated[int | None, integer(least=1, help=STEPS, rich_help_panel=PANEL)] = None,
    online_batch: Annotated[int | None, integer(least=1, most=MOST_TEXTS, help=TEXTS, rich_help_panel=PANEL)] = None,
) -> None:
    """Serve MODEL to OpenAI's clients: completions and chats, whole or streamed; SIGTERM ends it in order."""
    try:
        from jaxinfer.serve.devices import shares
        from jaxinfer.serve.messages import Setup
        from jaxinfer.serve.processes import StartError
        from jaxinfer.serve.server import Settings, bind, run
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"{error.name} is not installed: pip install 'jaxinfer[serve]'") from error
    _check_tls(ssl_certfile, ssl_keyfile)
    _check_key(api_key)
    setup = Setup(
        model,
        {
            "dtype": dtype,
            "max_model_len": max_model_len,
            "tensor_parallel_size": tensor_parallel,
            "pipeline_parallel_size": pipeline_parallel_size,
        },
        {
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_slowdown": max_slowdown,
            "page_size": page_size,
            "num_pages": num_pages,
            "steps_per_dispatch": steps_per_dispatch,
            "cache_dtype": cache_dtype,
            "always_speculate": speculation.always,
            "adaptive_speculation": speculation.adaptive,
            "enable_prefix_caching": prefix_caching,
            "max_waiting_time": max_waiting_time,
        },
        warm_up,
        speculation.settings,
        learning_draft(
            online_draft,
            speculation.settings["speculate"],
            learning_rate=online_learning_rate,
            interval=online_interval,
            batch=online_batch,
        ),
    )
    mesh = {"tensor_parallel_size": tensor_parallel, "pipeline_parallel_size": pipeline_parallel_size}
    try:
        setups = [replace(setup, devices=share) for share in shares(data_parallel_size, **mesh)]
    except ValueError as error:
        raise bad_argument(error) from error
    name = served_model_name or ("demo" if model is None else model)
    settings = Settings(name, max_waiting, shutdown_timeout, api_key, ssl_certfile, ssl_keyfile)
    try:
        bound = bind(host, port)
    except OSError as error:
        raise typer.BadParameter(f"cannot listen on port {port} of {host}: {error.strerror or error}") from error
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        speculation.warn(console.print)
        with bound, WarmUpBar(console) as bar:
            code = run(setups, settings, bound, lambda line: console.print(line, markup=False), bar.show)
    except StartError as error:
        _explain(error.failed, setup, console.print)
        code = 1
    raise typer.Exit(code)


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


def _check_key(key: str | None) -> None:
    """Refuses a key that no caller could send: a header has ASCII alone, and none of the spaces at its ends."""
    if key == "":
        raise typer.BadParameter("api_key is empty; leave it out, or give one")
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise typer.BadParameter(
            "api_key must be printable ASCII, without spaces at its ends, as a header can hold it"
        )


def _check_tls(certfile: str | None, keyfile: str | None) -> None:
    if certfile is None and keyfile is None:
        return
    if certfile is None or keyfile is None:
        raise typer.BadParameter("ssl_certfile and ssl_keyfile belong together; give both")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile)
    except OSError as error:
        raise typer.BadParameter(f"cannot use {certfile} with {keyfile}: {error}") from error


def _explain(failed: Failed, setup: Setup, say: Callable[[str], None]) -> None:
    """Says why the engine did not start; where memory was short, also what takes it and what would fit."""
    if failed.reason == "input":
        raise bad_argument(failed.message)
    say(f"[bold red]error:[/] {escape(failed.message)}")
    if failed.reason == "memory" and failed.device is not None:
        from jaxinfer.cli.room import memory_lines

        for line in memory_lines(setup, failed.device):
            say(line)

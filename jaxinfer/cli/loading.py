"""The options of how a model is loaded, declared once for all commands that run one."""

from __future__ import annotations

import typer

from jaxinfer.cli.options import gathering, integer, option

PANEL = "Engine"
# Arguments of `LLM` whose product is the number of an engine's devices.
MESH = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size")
# Arguments of `LLM`, by name.
LOADING = {
    "dtype": option(
        str | None, None,
        typer.Option(help="float32, bfloat16 or float16; the checkpoint's by default.", rich_help_panel=PANEL),
    ),
    "max_model_len": option(
        int | None, None,
        integer(help="Tokens of prompt and output; the checkpoint's by default.", rich_help_panel=PANEL),
    ),
    "tensor_parallel_size": option(
        int, 1, integer(least=1, help="Devices that share the model.", rich_help_panel=PANEL)
    ),
    "pipeline_parallel_size": option(
        int, 1, integer(least=1, help="Stages of so many devices, for the layers.", rich_help_panel=PANEL)
    ),
    "context_parallel_size": option(
        int, 1, integer(least=1, help="Devices that share every sequence.", rich_help_panel=PANEL)
    ),
}  # fmt: skip

loading = gathering("loading", LOADING, dict)
"""Gives a command the options LOADING, in the place of its argument `loading`, their values by name."""

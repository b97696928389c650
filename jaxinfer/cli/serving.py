"""The options of `jaxinfer serve`: of the network, and of the engine."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass

import typer

from jaxinfer.cli.loading import PANEL
from jaxinfer.cli.options import gathering, integer, number, option

_NETWORK = "Network"


@dataclass(frozen=True)
class Network:
    """Where a server listens, and to whom.

    Attributes:
        ssl_certfile, ssl_keyfile: for TLS, both or none.
    """

    host: str
    port: int
    api_key: str | None
    ssl_certfile: str | None
    ssl_keyfile: str | None

    def check(self) -> None:
        """Refuses what nobody could use, before anything is loaded.

        Raises:
            typer.BadParameter: says what.
        """
        _check_tls(self.ssl_certfile, self.ssl_keyfile)
        _check_key(self.api_key)

    def bind(self) -> socket.socket:
        """
        Raises:
            typer.BadParameter: the address is in use, or none of this machine's.
        """
        from jaxinfer.serve.server import bind

        try:
            return bind(self.host, self.port)
        except OSError as error:
            said = error.strerror or error
            raise typer.BadParameter(f"cannot listen on port {self.port} of {self.host}: {said}") from error


NETWORK = {
    "host": option(
        str, "127.0.0.1", typer.Option(help="Address to listen on; 0.0.0.0 is every one.", rich_help_panel=_NETWORK)
    ),
    "port": option(
        int, 8000, integer(least=0, most=65535, help="0 takes any that is free.", rich_help_panel=_NETWORK)
    ),
    "api_key": option(
        str | None, None,
        typer.Option(envvar="JAXINFER_API_KEY", help="Callers must send it.", rich_help_panel=_NETWORK),
    ),
    "ssl_certfile": option(
        str | None, None, typer.Option(help="PEM file: serves over TLS.", rich_help_panel=_NETWORK)
    ),
    "ssl_keyfile": option(str | None, None, typer.Option(help="PEM file of its key.", rich_help_panel=_NETWORK)),
}  # fmt: skip

# `Options` of the engine, by name.
ENGINE = {
    "max_num_seqs": option(
        int, 64, integer(help="Sequences that run at once; a power of two.", rich_help_panel=PANEL)
    ),
    "max_num_batched_tokens": option(
        int, 1024, integer(help="Prompt tokens of one step; a power of two.", rich_help_panel=PANEL)
    ),
    "max_slowdown": option(
        float, 1.75,
        number(
            least=1, rich_help_panel=PANEL,
            help="Of a decode step by prompts beside it, as predicted; inf for none.",
        ),
    ),
    "page_size": option(int, 16, integer(help="Tokens of a page of the cache.", rich_help_panel=PANEL)),
    "num_pages": option(
        int | None, None,
        integer(help="Pages of the cache on each device; as many as fit by default.", rich_help_panel=PANEL),
    ),
    "steps_per_dispatch": option(
        int, 8, integer(help="Decode steps in one program, and tokens in one event.", rich_help_panel=PANEL)
    ),
    "cache_dtype": option(
        str | None, None,
        typer.Option(
            rich_help_panel=PANEL, help="Of keys and values, also int8 or float8_e4m3fn; the model's by default."
        ),
    ),
    "enable_prefix_caching": option(
        bool, True,
        typer.Option(
            "--prefix-caching/--no-prefix-caching", rich_help_panel=PANEL,
            help="Prompts that begin alike share the pages of it.",
        ),
    ),
    "max_waiting_time": option(
        float | None, None, typer.Option(help="Seconds that a request may wait to run.", rich_help_panel=PANEL)
    ),
}  # fmt: skip

networking = gathering("network", NETWORK, lambda given: Network(**given))
"""Gives a command the options NETWORK, in the place of its argument `network`, a `Network`."""

engine_options = gathering("engine", ENGINE, dict)
"""Gives a command the options ENGINE, in the place of its argument `engine`, their values by name."""


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

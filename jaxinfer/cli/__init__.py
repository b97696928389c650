"""The command `jaxinfer`. Each subcommand is a module of this folder; its imports wait until it is called."""

from __future__ import annotations

from jaxinfer.cli.app import app

__all__ = ["app"]

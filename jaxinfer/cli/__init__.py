"""The command `jaxinfer`. Each subcommand is a module of this folder."""

from __future__ import annotations

from jaxinfer.cli.app import app

__all__ = ["app"]

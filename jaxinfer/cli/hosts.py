"""The options of several hosts, declared once for all commands that run an engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from jaxinfer.cli.options import bad_argument, gathering, integer, number, option

if TYPE_CHECKING:
    from jaxinfer.parallel import Group

_PANEL = "Several hosts"
OPTIONS = {
    "coordinator": option(
        str | None, None,
        typer.Option(
            help="HOST:PORT of process 0, where the others find it; auto takes all three from the cluster, which "
            "tasks of srun do without it.",
            rich_help_panel=_PANEL,
        ),
    ),
    "num_processes": option(
        int | None, None, integer(least=2, help="Processes that share the model.", rich_help_panel=_PANEL)
    ),
    "process_id": option(
        int | None, None,
        integer(least=0, help="Of this process; 0 leads, and is the one to ask.", rich_help_panel=_PANEL),
    ),
    "start_timeout": option(
        float | None, None,
        number(least=1, help="Seconds that a process waits for the others at the start; 300.", rich_help_panel=_PANEL),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Hosting:
    """The group that a command was asked to join.

    Attributes:
        settings: arguments of `parallel.join`; None where it runs alone.
    """

    settings: dict[str, Any] | None

    def join(self) -> AbstractContextManager[Group | None]:
        """Makes this process one of the group, for a block.

        Raises:
            typer.BadParameter: as `parallel.join`.
        """
        if self.settings is None:
            return nullcontext()
        from jaxinfer.parallel import join

        try:
            return join(**self.settings)
        except (ValueError, OSError) as error:
            raise bad_argument(error) from error

    def refuse(self, name: str, value: Any, instead: str = "") -> None:
        """Raises typer.BadParameter for an option that several processes have no use for.

        Args:
            instead: what would do.
        """
        if self.settings is not None:
            told = f"{name} = {value!r} has no use where several processes share the model"
            raise bad_argument(f"{told}; {instead}" if instead else told)


def settings(given: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of `parallel.join`; None for a process that is alone.

    Raises:
        typer.BadParameter: an option has no use without `coordinator`.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    if "coordinator" not in asked:
        for name, value in asked.items():
            raise typer.BadParameter(f"{name} = {value!r} has no use without --coordinator")
        if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) < 2 or "SLURM_PROCID" not in environment:
            return None
    asked["timeout"] = asked.pop("start_timeout", 300)
    return {"coordinator": "auto"} | asked


hosting = gathering("hosts", OPTIONS, lambda given: Hosting(settings(given, os.environ)))
"""Gives a command the OPTIONS, in the place of its argument `hosts`, a `Hosting`."""

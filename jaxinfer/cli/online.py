"""What `serve --online-draft` adds to the engine process: a draft model that learns from what the engine brings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from jaxinfer.cli.options import gathering, integer, number, option
from jaxinfer.cli.speculation import PANEL

if TYPE_CHECKING:
    from jaxinfer.engine import Engine
    from jaxinfer.engine.request import Watch

MOST_TEXTS = 256  # that may wait

# By the names of `OnlineDraft`'s settings, after `online_`; one that is left out is its own.
OPTIONS = {
    "online_draft": option(
        bool, False,
        typer.Option(
            "--online-draft", rich_help_panel=PANEL,
            help="Let the draft model of draft go on learning, from the tokens that replaced its proposals: a step of "
            "training now and then between two of the engine, once enough texts have ended. Beside the cache it takes "
            "three float32 copies of the draft.",
        ),
    ),
    "online_learning_rate": option(
        float | None, None,
        number(least=1e-9, most=1, help="Of Adam, for --online-draft; 0.0001 by default.", rich_help_panel=PANEL),
    ),
    "online_interval": option(
        int | None, None,
        integer(
            least=1, rich_help_panel=PANEL,
            help="Steps of the engine between two of training, for --online-draft; 16 by default.",
        ),
    ),
    "online_batch": option(
        int | None, None,
        integer(
            least=1, most=MOST_TEXTS, rich_help_panel=PANEL,
            help="Texts of one step of training, for --online-draft, which waits for as many; 8 by default.",
        ),
    ),
}  # fmt: skip

learning = gathering("learning", OPTIONS, dict)
"""Gives a command the OPTIONS, in the place of its argument `learning`, their values by name."""


def learning_draft(speculate: str | None, online_draft: bool, **settings: Any) -> Callable[[Engine], Watch] | None:
    """What makes the learner, for `Setup.watch`; None where none is wanted.

    Args:
        settings: the other OPTIONS; None leaves one to `OnlineDraft`.

    Raises:
        typer.BadParameter: no draft model drafts, or a setting has no use.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if not online_draft:
        for name, value in given.items():
            raise typer.BadParameter(f"{name} = {value!r} has no use without --online-draft")
        return None
    if speculate != "draft":
        raise typer.BadParameter(f"online_draft has no use where speculate = {speculate!r}; it must be 'draft'")
    return partial(learner, **{name.removeprefix("online_"): value for name, value in given.items()})


def learner(engine: Engine, **settings: Any) -> Watch:
    """Learns from what the engine brings; see `OnlineDraft`."""
    from jaxinfer.training.online import OnlineDraft

    return OnlineDraft(engine, **settings).see

"""What `serve --online-draft` adds to the engine process: a draft model that learns from what the engine brings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from jaxinfer.engine import Engine
    from jaxinfer.engine.request import Watch

LEARN = (
    "Let the draft model of draft go on learning, from the tokens that replaced its proposals: a step of training now "
    "and then between two of the engine, once enough texts have ended. Beside the cache it takes three float32 copies "
    "of the draft."
)
RATE = "Of Adam, for --online-draft; 0.0001 by default."
STEPS = "Steps of the engine between two of training, for --online-draft; 16 by default."
TEXTS = "Texts of one step of training, for --online-draft, which waits for as many; 8 by default."
MOST_TEXTS = 256  # that may wait


def learning_draft(wanted: bool, speculate: str | None, **settings: Any) -> Callable[[Engine], Watch] | None:
    """What makes the learner, for `Setup.watch`; None where none is wanted.

    Args:
        settings: of `OnlineDraft`; None leaves one to it.

    Raises:
        typer.BadParameter: no draft model drafts, or a setting has no use.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if not wanted:
        for name, value in given.items():
            raise typer.BadParameter(f"online_{name} = {value!r} has no use without --online-draft")
        return None
    if speculate != "draft":
        raise typer.BadParameter(f"online_draft has no use where speculate = {speculate!r}; it must be 'draft'")
    return partial(learner, **given)


def learner(engine: Engine, **settings: Any) -> Watch:
    """Learns from what the engine brings; see `OnlineDraft`."""
    from jaxinfer.training.online import OnlineDraft

    return OnlineDraft(engine, **settings).see

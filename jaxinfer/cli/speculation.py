"""The options of speculation, declared once for all commands that decode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from jaxinfer.cli.options import gathering, integer, number

PANEL = "Speculation"
CHANGES = "outputs that are drawn at random no longer have the model's distribution"


@dataclass(frozen=True)
class Speculating:
    """What a command was asked for.

    Attributes:
        settings: arguments of `decode.speculative.by_name`; None leaves one to the method.
        always, adaptive: `always_speculate` and `adaptive_speculation` of the engine's `Options`.
    """

    settings: dict[str, Any]
    always: bool
    adaptive: bool

    def options(self) -> dict[str, Any]:
        """For the engine's `Options`.

        Raises:
            ValueError: as `by_name`.
        """
        from jaxinfer.decode.speculative import by_name

        return {
            "speculation": by_name(**self.settings),
            "always_speculate": self.always,
            "adaptive_speculation": self.adaptive,
        }

    def warn(self, say: Callable[[str], None]) -> None:
        """Says so where outputs will not have the model's distribution."""
        if self.settings["typical"] and self.settings["speculate"] == "medusa":  # of no use elsewhere, and refused
            say(f"typical acceptance: {CHANGES}")


def _flag(names: str, text: str) -> Any:
    return Annotated[bool | None, typer.Option(names, help=text, rich_help_panel=PANEL)]


def _integer(text: str) -> Any:
    return Annotated[int | None, integer(help=text, rich_help_panel=PANEL)]


def _number(text: str) -> Any:
    return Annotated[float | None, number(help=text, rich_help_panel=PANEL)]


def _text(text: str) -> Any:
    return Annotated[str | None, typer.Option(help=text, rich_help_panel=PANEL)]


# By the names of the methods' own settings; a number that is left out is the method's own.
OPTIONS = {
    "speculate": _text(
        "How to propose tokens, which are verified together: lookup (what followed the same tokens before), draft "
        "(what a smaller model draws), early-exit (what the first layers of the model draw), lookahead (what the "
        "model drew ahead of the text), medusa (what heads on its last hidden state say) or eagle (what a layer on "
        "its hidden states says)."
    ),
    "always_speculate": _flag(
        "--always-speculate", "Propose tokens also where plain decoding is predicted to be faster."
    ),
    "num_speculative_tokens": _integer("Tokens of a proposal, of a tree its nodes."),
    "adaptive_speculation": _flag(
        "--adaptive-speculation",
        "lookup, draft, early-exit: propose fewer tokens where that is predicted to be faster.",
    ),
    "draft_model": _text(
        "The smaller model of draft, with the same tokenizer, the heads of medusa or the head of eagle: a folder or a "
        "Hugging Face id; the demo model has its own of each."
    ),
    "prompt_lookup_max": _integer("lookup: tokens that are looked for, at most."),
    "exit_layers": _integer("early-exit: layers that draft; a quarter of the model's by default."),
    "coupled": _flag(
        "--coupled", "draft, early-exit: accept a little less, so that drawn outputs, too, are plain decoding's own."
    ),
    "window_size": _integer("lookahead: tokens of a level of the window."),
    "ngram_size": _integer("lookahead: tokens of an n-gram, one more than the window has levels."),
    "max_verification_set_size": _integer("lookahead: n-grams that are proposed in one step."),
    "pool_size": _integer("lookahead: n-grams that are kept for each sequence."),
    "depth": _integer("eagle: tokens of the longest path of the tree, each of which takes a pass of the head."),
    "branches": _integer("eagle: tokens that may follow one, at most; 1 proposes a chain."),
    "dynamic": _flag(
        "--dynamic/--static", "eagle: a tree of the likeliest paths, another one for each step, or always the same."
    ),
    "typical": _flag("--typical", f"medusa: accept also what is likely enough. More tokens count, but {CHANGES}."),
    "typical_epsilon": _number("--typical: the probability above which a token always is likely enough."),
    "typical_delta": _number("--typical: the part of exp(-entropy) above which it is."),
}  # fmt: skip


def _asked(given: dict[str, Any]) -> Speculating:
    always, adaptive = (bool(given.pop(name)) for name in ("always_speculate", "adaptive_speculation"))
    return Speculating(given, always, adaptive)


speculating = gathering("speculation", OPTIONS, _asked)
"""Gives a command the OPTIONS, in the place of its argument `speculation`, a `Speculating`."""

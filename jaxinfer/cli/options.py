"""Options that take a number, and errors of other layers in the words of the command line.

Each error names the option, the value that was given and what is allowed.
"""

from __future__ import annotations

from typing import Any

import typer

_NAMES = {"tensor_parallel_size": "--tensor-parallel", "data_parallel_size": "--data-parallel-size",
          "pipeline_parallel_size": "--pipeline-parallel-size"}  # fmt: skip


def integer(least: int | None = None, most: int | None = None, **option: Any) -> Any:
    """A `typer.Option` of an integer in `least`..`most`; `option` goes to it."""
    return _number(int, "an integer", least, most, option)


def number(least: float | None = None, most: float | None = None, **option: Any) -> Any:
    """A `typer.Option` of a number in `least`..`most`; `option` goes to it."""
    return _number(float, "a number", least, most, option)


def bad_argument(error: Exception | str) -> typer.BadParameter:
    """An error of other layers, whose arguments with another name here get that name."""
    message = str(error)
    for theirs, ours in _NAMES.items():
        message = message.replace(theirs, ours)
    return typer.BadParameter(message)


def _number(
    kind: type[int] | type[float], what: str, least: float | None, most: float | None, option: dict[str, Any]
) -> Any:
    """Without `least` any number passes, and what the command hands it to checks it."""
    highest = float("inf") if most is None else most
    limits = "" if least is None else f", at least {least}" if most is None else f" in {least}..{most}"

    def parse(value: Any) -> int | float:
        try:
            parsed = kind(value)
        except ValueError:
            raise typer.BadParameter(f"{value!r} must be {what}{limits}") from None
        if least is not None and not least <= parsed <= highest:
            raise typer.BadParameter(f"{value} must be {what}{limits}")
        return parsed

    return typer.Option(parser=parse, min=least, max=most, **option)  # the range is shown by --help

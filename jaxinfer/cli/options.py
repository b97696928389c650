"""Options that take a number, and errors of other layers in the words of the command line.

Each error names the option, the value that was given and what is allowed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import typer

_NAMES = {"tensor_parallel_size": "--tensor-parallel", "data_parallel_size": "--data-parallel-size"}


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


def gathering(
    name: str, options: Mapping[str, Any], make: Callable[[dict[str, Any]], Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the `options`, declared once for several commands, in the place of its argument `name`.

    Args:
        options: their annotations by name; None is the default of each.
        make: the argument, of their values by name.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        parameters = []
        for parameter in signature.parameters.values():
            if parameter.name == name:
                kind = inspect.Parameter.KEYWORD_ONLY
                parameters += [inspect.Parameter(one, kind, default=None, annotation=options[one]) for one in options]
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

        @wraps(command)
        def run(**given: Any) -> None:
            asked = {one: given.pop(one) for one in options}
            command(**given, **{name: make(asked)})

        vars(run)["__signature__"] = signature.replace(parameters=parameters)
        return run

    return decorate


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

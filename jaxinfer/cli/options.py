"""Options that take a number, and errors of other layers in the words of the command line.

Each error names the option, the value that was given and what is allowed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any

import typer

_PARALLEL = re.compile(r"\b(tensor|pipeline|context|data)_parallel(_size)?\b")  # as other layers name the options


def integer(*names: str, least: int | None = None, most: int | None = None, **option: Any) -> Any:
    """A `typer.Option` of an integer in `least`..`most`; `names` and `option` go to it."""
    return _number(int, "an integer", least, most, names, option)


def number(*names: str, least: float | None = None, most: float | None = None, **option: Any) -> Any:
    """A `typer.Option` of a number in `least`..`most`; `names` and `option` go to it."""
    return _number(float, "a number", least, most, names, option)


def bad_argument(error: Exception | str) -> typer.BadParameter:
    """An error of other layers, in which the sizes of the mesh get the names that they have here."""
    return typer.BadParameter(_PARALLEL.sub(r"--\1-parallel-size", str(error)))


def option(kind: Any, default: Any, info: Any) -> tuple[Any, Any]:
    """An option for `gathering`: its type, its default, and what `typer.Option` or a function of this file gives."""
    return Annotated[kind, info], default


def gathering(
    name: str, options: Mapping[str, tuple[Any, Any]], make: Callable[[dict[str, Any]], Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the `options`, declared once for several commands, in the place of its argument `name`.

    Args:
        options: by name, as `option` gives them.
        make: the argument, of their values by name.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        kind, parameters = inspect.Parameter.KEYWORD_ONLY, []
        signature = inspect.signature(command, eval_str=True)
        for parameter in signature.parameters.values():
            if parameter.name == name:
                parameters += [
                    inspect.Parameter(one, kind, default=default, annotation=annotation)
                    for one, (annotation, default) in options.items()
                ]
            else:
                parameters.append(parameter.replace(kind=kind))

        @wraps(command)
        def run(**given: Any) -> None:
            asked = {one: given.pop(one) for one in options}
            command(**given, **{name: make(asked)})

        vars(run)["__signature__"] = signature.replace(parameters=parameters)
        return run

    return decorate


def _number(
    kind: type[int] | type[float], what: str, least: float | None, most: float | None, names: tuple[str, ...],
    option: dict[str, Any],
) -> Any:  # fmt: skip
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

    return typer.Option(*names, parser=parse, min=least, max=most, **option)  # the range is shown by --help

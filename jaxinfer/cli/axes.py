"""Commands that take the axes of a mesh, each once."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

_AXIS = "_parallel_size"


class OncePerAxis(TyperCommand):
    """Refuses an axis that is named twice, of which else the last size would count and the others go unseen."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for axis in (param for param in self.params if str(param.name).endswith(_AXIS)):
            if len(sizes := _given(axis.opts, args)) > 1:
                told = " and ".join(sizes)
                raise typer.BadParameter(
                    f"{axis.opts[0]} is given {len(sizes)} times, {told}; an axis has one size", ctx=ctx
                )
        return super().parse_args(ctx, args)


def _given(names: list[str], args: list[str]) -> list[str]:
    """What follows an option, as `NAME VALUE` or `NAME=VALUE`, each time that it comes, by whichever name."""
    own = args[: args.index("--")] if "--" in args else args
    found = []
    for word, after in zip(own, [*own[1:], ""], strict=False):
        option, equals, value = word.partition("=")
        if option in names:
            found.append(value if equals else after)
    return found

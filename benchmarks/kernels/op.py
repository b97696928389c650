"""What the harness asks of an op: problems, their arguments, and implementations. A new op is one file in `ops/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax

Arguments = dict[str, Any]  # arrays, or trees of them, by name
OURS = "mosaic_gpu"  # the implementation that the others are the peers of
SPECIFICATION = "reference"  # dense and in float32: timed only when asked for


class Unsupported(Exception):
    """An implementation does not take a problem, or is not there; the message says why."""


class Problem(Protocol):
    """The work of one call, as it is counted whatever runs it."""

    @property
    def flops(self) -> float: ...

    @property
    def bytes(self) -> float:
        """Of memory traffic, each input and output that is counted once."""
        ...


@dataclass(frozen=True)
class Run:
    """One implementation on one problem.

    Attributes:
        call: from the prepared arguments to the output. Outputs of all implementations hold the same numbers in the
            same order, in whatever shape.
        prepare: from the op's arguments to those of `call`, where they differ; it is not timed.
    """

    call: Callable[[Arguments], jax.Array]
    prepare: Callable[[Arguments], Arguments] | None = None


@dataclass(frozen=True)
class Tuning[P: Problem]:
    """What `pallas_kernels/<op>/config.py` offers to the search.

    Attributes:
        path: of the file that keeps the best configs.
        key: under which a problem's config is looked up; problems may share one.
        candidates: configs that the kernel can launch for a problem, the one that it would take without tuning first.
        configured: the run of our kernel with one of them.
    """

    path: Path
    key: Callable[[P], str]
    candidates: Callable[[P], Sequence[Any]]
    configured: Callable[[P, Any], Run]


@dataclass(frozen=True)
class Op[P: Problem]:
    """One op and all that can run it.

    Attributes:
        problems: by name.
        arguments: random arguments of a problem, all arrays by name.
        implementations: by name, the run of a problem. Ours is named OURS. Raises Unsupported for what it cannot take.
        peers: names of the implementations, besides ours, that are timed on a problem if none is named.
        unit: `TFLOP/s` or `TB/s`, what the op's speed is shown in.
        quick: names of the problems that stand for all when time is short.
        curve: problems of the plot, by their place on its axis `curve_label`.
        tuning: of our kernel; None where it has nothing to choose.
    """

    name: str
    problems: Mapping[str, P]
    arguments: Callable[[P, jax.Array], Arguments]
    implementations: Mapping[str, Callable[[P], Run]]
    peers: Callable[[P], tuple[str, ...]]
    unit: str
    quick: tuple[str, ...]
    curve: Mapping[float, str]
    curve_label: str
    tuning: Tuning[P] | None = None

    def case(self, problem: str) -> str:
        """The name that a problem has in the records."""
        return f"{self.name} {problem}"

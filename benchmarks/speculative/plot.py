"""Gain against batch: a panel for each text, a line for each method."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.record import OURS, Record
from benchmarks.speculative.comparing import FASTER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEVER_BELOW = 0.97  # of plain decoding, where the gate decides
_CASE = re.compile(r"(?P<text>.+) B(?P<batch>\d+)( by .+)?")
_WAY = re.compile(rf"{OURS}, (?P<method>\S+)(?P<always> always)?")


def plot_gains(records: Sequence[Record]) -> Figure:
    """Draws how many times as fast as plain decoding each method is: where the gate decides, and where it always
    proposes.

    Args:
        records: measured; those of what is predicted are not drawn.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("a plot needs matplotlib: pip install 'jaxinfer[plots]'") from None
    panels = gains(records)
    figure = Figure(figsize=(5 * max(len(panels), 1), 4.5), layout="constrained")
    for place, (text, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place, xscale="log", title=text)
        colors = {method: f"C{number}" for number, method in enumerate(dict.fromkeys(method for method, _ in lines))}
        for (method, always), points in lines.items():
            label, style = (f"{method}, always", "x--") if always else (method, "o-")
            axes.plot(*zip(*points, strict=True), style, color=colors[method], label=label)
        axes.axhline(NEVER_BELOW, color="black", linestyle=":", label=f"{NEVER_BELOW} of plain decoding")
        batches = sorted({batch for points in lines.values() for batch, _ in points})
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.set(xlabel="sequences", ylabel="times plain decoding", ylim=(0, None))
        axes.legend(fontsize=8)
    return figure


def gains(records: Sequence[Record]) -> dict[str, dict[tuple[str, bool], list[tuple[int, float]]]]:
    """By text, then by method and whether it always proposes: batches and gains, in the order of the batches."""
    panels: dict[str, dict[tuple[str, bool], list[tuple[int, float]]]] = {}
    for record in records:
        case, way = _CASE.fullmatch(record.case), _WAY.fullmatch(record.implementation)
        if record.metric == FASTER and case and way:
            points = panels.setdefault(case["text"], {}).setdefault((way["method"], bool(way["always"])), [])
            points.append((int(case["batch"]), record.value))
    return {text: {key: sorted(points) for key, points in sorted(lines.items())} for text, lines in panels.items()}

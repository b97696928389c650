"""Speed against length: a panel for each op, a line for each implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.kernels.op import OURS, Op
from benchmarks.record import Record
from jaxinfer.roofline import Hardware

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_speeds(ops: Sequence[Op], records: Sequence[Record], stated: Sequence[Record], machine: Hardware) -> Figure:
    """Draws the speed of each op's curve under the machine's ceiling.

    Args:
        ops: those that get a panel.
        records: measured; a line each, ours the widest.
        stated: other systems' figures, not measured in this run; dashed lines.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("a plot needs matplotlib: pip install 'jaxinfer[plots]'") from None
    figure = Figure(figsize=(6 * len(ops), 4.5), layout="constrained")
    for i, op in enumerate(ops):
        axes = figure.add_subplot(1, len(ops), i + 1, xscale="log", xticks=list(op.curve))
        for implementation, points in lines(op, records).items():
            axes.plot(*points, marker="o", linewidth=2.5 if implementation == OURS else 1.2, label=implementation)
        for implementation, points in lines(op, stated).items():
            axes.plot(*points, marker="x", linestyle="--", label=f"{implementation} (stated)")
        ceiling = machine.rate("bf16") if op.unit == "TFLOP/s" else machine.bandwidth
        axes.axhline(ceiling / 1e12, color="black", linestyle=":", label=f"limit of {machine.device_kind}")
        axes.set_xticks(list(op.curve), [f"{place:,g}" for place in op.curve])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set(title=op.name, xlabel=op.curve_label, ylabel=op.unit)
        axes.legend(fontsize=8)
    return figure


def lines(op: Op, records: Sequence[Record]) -> dict[str, tuple[list[float], list[float]]]:
    """Places and speeds by implementation, in the order of the curve."""
    places = {op.case(name): place for place, name in op.curve.items()}
    points: dict[str, tuple[list[float], list[float]]] = {}
    for record in sorted(records, key=lambda record: places.get(record.case, 0)):
        if record.case in places and record.unit == op.unit:
            xs, ys = points.setdefault(record.implementation, ([], []))
            xs.append(places[record.case])
            ys.append(record.value)
    return points

"""The roofline of a machine with the parts of a step on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxinfer.roofline.cost import Cost
from jaxinfer.roofline.hardware import Hardware

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of each step: marker, and where its labels stand from the point. Two steps may share points, so they differ.
_STYLES = (("o", (-6, 6), "right"), ("s", (6, -12), "left"))
_INTENSITIES = (0.05, 500_000.0)  # FLOP per byte


def plot_roofline(hardware: Hardware, costs: Mapping[str, Cost], dtype: str = "bf16") -> Figure:
    """Draws the rate that each part of each cost can reach over its arithmetic intensity.

    Args:
        costs: one or two steps, by the name that the legend gives them.
        dtype: operands of the matmuls whose roof is drawn.

    Returns:
        A figure, to be saved or shown.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message says how to install it.
        ValueError: the device has no matmul of that dtype.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("a roofline plot needs matplotlib: pip install 'jaxinfer[plots]'") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    knee = hardware.balance(dtype)
    left, right = _INTENSITIES
    peak = hardware.rate(dtype)
    axes.plot([left, knee, right], [left * hardware.bandwidth, peak, peak], color="black")
    axes.axvline(knee, color="gray", linestyle=":")
    axes.annotate(f" {knee:.0f} FLOP/byte", (knee, 2 * left * hardware.bandwidth), color="gray")
    for (step, cost), (marker, offset, side) in zip(costs.items(), _STYLES, strict=False):
        points = _points(cost, hardware)
        axes.scatter(*zip(*points, strict=True), marker=marker, label=step, zorder=3)
        for point, parts in points.items():
            label = f"{step}: {', '.join(parts)}"
            axes.annotate(label, point, offset, textcoords="offset points", ha=side, fontsize=8)
    axes.set_xlim(left, right)
    axes.set_ylim(left * hardware.bandwidth, 3 * peak)
    axes.set_xlabel("arithmetic intensity (FLOP per byte of memory traffic)")
    axes.set_ylabel("attainable FLOP/s")
    axes.set_title(f"{hardware.name}: {dtype} matmuls and memory")
    axes.legend(loc="lower right")
    return figure


def _points(cost: Cost, hardware: Hardware) -> dict[tuple[float, float], list[str]]:
    """Intensity and attainable rate, to two digits, with the names of the parts that lie there."""
    points = defaultdict(list)
    for name, part in cost.parts.items():
        if part.flops:
            rate = part.flops / part.limit(hardware)
            points[float(f"{part.intensity:.1e}"), float(f"{rate:.1e}")].append(name)
    return points

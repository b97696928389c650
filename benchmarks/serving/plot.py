"""Throughput against latency: every point is a rate of arrival, every line a system."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Silent reading of English prose: 238 words a minute in the mean of 190 studies (Brysbaert 2019). A word is about 4/3
# tokens.
READING = 60 / (238 * 4 / 3)  # seconds a token


def plot_curve(records: Sequence[Record]) -> Figure:
    """Seconds that a token takes over all tokens of a second, p50 and p99, and the speed at which people read.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("a plot needs matplotlib: pip install 'jaxinfer[plots]'") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="output tokens a second, all requests", ylabel="ms a token", yscale="log")
    for (implementation, percentile), points in curves(records).items():
        axes.plot(*points, marker="o", label=f"{implementation}, {percentile}")
    axes.axhline(READING * 1e3, color="black", linestyle=":", label="people read at this speed")
    axes.legend(fontsize=8)
    return figure


def curves(records: Sequence[Record]) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """Throughputs and times of a token, by system and percentile, in the order of throughput."""
    values = {(record.case, record.implementation, record.metric): record.value for record in records}
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (case, implementation, metric), value in values.items():
        throughput = values.get((case, implementation, "output throughput"))
        if metric in ("time per token p50", "time per token p99") and throughput is not None:
            points.setdefault((implementation, metric.rsplit(" ", 1)[1]), []).append((throughput, value))
    return {key: ([x for x, _ in sorted(found)], [y for _, y in sorted(found)]) for key, found in points.items()}

"""Accuracy over sample-forwards, one panel a data set, from the rows of a result."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedzo.experiments.pictures import COLOURS, check_matplotlib

from .cells import TARGETS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

_METHODS = {
    "baseline": "BAFFLE form",
    "ours": "ours (node)",
    "local": "local, not zeroth-order",
    "backprop": "backprop",
}
_SHORT = ("60k", "150k", "300k")

Row = Mapping[str, Any]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the figure, as SVG or PNG.

    Lines are medians over the seeds of dense runs with the target's budget; points are ends of shorter runs of ours,
    each with a schedule of its own.

    Raises:
        ConfigError: Matplotlib is not installed, or the name has another suffix.
    """
    check_matplotlib(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = [data for data in TARGETS if any(row["data"] == data for row in rows)]
    with mpl.rc_context({"svg.hashsalt": "fedzo", "font.size": 9.0, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(3.3 * len(names), 3.0), layout="constrained")
        for panel, data in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            _panel(panel, [row for row in rows if row["data"] == data and _is_main(row)], data)
        handles, labels = figure.axes[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def _is_main(row: Row) -> bool:
    return bool((row["mask"], row["world"]) == ("dense", "main"))


def _panel(panel: Axes, rows: Sequence[Row], data: str) -> None:
    for colour, (method, label) in zip(COLOURS, _METHODS.items(), strict=False):
        runs = [row for row in rows if row["method"] == method and row["budget"] == TARGETS[data]]
        curve = _median([row["curve"] for row in runs])
        if curve:
            panel.plot([sf for sf, _ in curve], [y for _, y in curve], color=colour, label=label, linewidth=1.4)
        if method == "baseline" and runs:
            panel.axhline(curve[-1][1], color=colour, linestyle=":", linewidth=1.0)
        if method == "ours":
            ends = [
                _median([row["curve"] for row in rows if row["method"] == method and row["budget"] == b])
                for b in _SHORT
            ]
            ends = [end[-1:] for end in ends if end]
            panel.plot(
                [sf for end in ends for sf, _ in end],
                [y for end in ends for _, y in end],
                "o",
                color=colour,
                markersize=4,
            )
    panel.set_xscale("log")
    panel.set_title(f"{data}, LeNet-5")
    panel.set_xlabel("sample-forwards")
    panel.set_ylabel("test accuracy, %")


def _median(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Point by point; seeds evaluate after the same rounds."""
    shortest = min(map(len, curves), default=0)
    points = [[curve[k] for curve in curves] for k in range(shortest)]
    if curves and shortest:
        points[-1] = [curve[-1] for curve in curves]
    return [(statistics.median(sf for sf, _ in each), 100.0 * statistics.median(y for _, y in each)) for each in points]

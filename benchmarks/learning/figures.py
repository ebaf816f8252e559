"""The numbers that texts quote, out of rows; and which cells of the table have none."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .cells import TARGETS, Cell

__all__ = ["CURVE_DIGITS", "absent", "figures", "newest"]

Row = Mapping[str, Any]
CURVE_DIGITS = 5
"""Of the accuracies on the curves of a report."""


def newest(rows: Iterable[Row], cells: Sequence[Cell], *, any_settings: bool = False) -> list[Row]:
    """The latest good row of every cell, in the order of the table.

    Args:
        rows: Oldest first.
        cells: The table.
        any_settings: Take rows of other settings too.
    """
    latest: dict[str, Row] = {}
    for row in rows:
        if row.get("accuracy") is not None and row.get("part") == "test":
            for cell in cells:
                if cell.is_of(row) or (any_settings and cell.key == row["key"] and cell.scale == row["scale"]):
                    latest[cell.key] = row
    return [latest[cell.key] for cell in cells if cell.key in latest]


def absent(rows: Iterable[Row], cells: Sequence[Cell]) -> list[str]:
    """Keys of the cells without a row."""
    found = {row["key"] for row in rows}
    return [cell.key for cell in cells if cell.key not in found]


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """All of them, where there are rows: accuracies and their differences in percent, medians over the seeds.

    A difference is one of medians over the seeds that both sides have.
    """
    found: dict[str, float] = {}
    accuracies: dict[tuple[str, ...], dict[int, float]] = {}
    for row in rows:
        names = tuple(row[name] for name in ("data", "method", "mask", "world", "budget"))
        accuracies.setdefault(names, {})[row["seed"]] = 100.0 * row["accuracy"]
    for (data, method, mask, world, budget), values in accuracies.items():
        if (mask, world) == ("dense", "main"):
            found[f"{data}_{method}_{budget}"] = statistics.median(values.values())
    for data in dict.fromkeys(row["data"] for row in rows):
        ratio = _ratio([row for row in rows if row["data"] == data])
        if ratio is not None:
            found[f"sf_ratio_{data}"] = ratio
        for method in ("ours", "local"):
            end = "" if method == "ours" else f"_{method}"
            for name, (mask, world), (other_mask, other_world) in (
                ("pruned80_minus_dense", ("pruned80", "main"), ("dense", "main")),
                ("dirichlet01_minus_iid", ("dense", "dirichlet01"), ("dense", "iid50")),
            ):
                one = accuracies.get((data, method, mask, world, TARGETS[data]), {})
                other = accuracies.get((data, method, other_mask, other_world, TARGETS[data]), {})
                both = one.keys() & other.keys()  # a seed that only one of them has would tilt the difference
                if both:
                    first, second = (statistics.median([each[seed] for seed in both]) for each in (one, other))
                    found[f"{name}_{data}{end}"] = first - second
    return found


def _ratio(rows: Sequence[Row]) -> float | None:
    """SF of ours to reach the baseline's final accuracy, over the SF that the baseline needs for it first.

    Ours may be any run of the seed on the whole network, a short one with a schedule of its own too.
    """
    plain = [row for row in rows if (row["mask"], row["world"]) == ("dense", "main")]
    data = plain[0]["data"] if plain else ""
    ratios = []
    for row in plain:
        if row["method"] == "baseline" and row["budget"] == TARGETS[data]:
            goal = round(row["accuracy"], CURVE_DIGITS)  # or it would lie above the same accuracy on a curve
            own = _first(row["curve"], goal) or row["sample_forwards"]
            others = [other for other in plain if other["method"] == "ours" and other["seed"] == row["seed"]]
            reached = [sf for other in others if (sf := _first(other["curve"], goal)) is not None]
            if reached:
                ratios.append(min(reached) / own)
            elif others:
                return None
    return statistics.median(ratios) if ratios else None


def _first(curve: Sequence[Sequence[float]], goal: float) -> float | None:
    return next((sf for sf, accuracy in curve if accuracy is not None and accuracy >= goal), None)

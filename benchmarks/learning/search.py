"""Hyper-parameters by short runs on a validation split of the training data.

``python -m benchmarks.learning.search --only fashion_mnist/ours/dense/main --grid learning_rate=2e-3,4e-3,8e-3 \
    --budget 300k --data-folder DATA --resume search.jsonl [--adopt]``

Every group (data, method, mask, world) is trained on the training set without a validation part for all points of
the grid. The best point has the highest median accuracy over the seeds; ``--adopt`` writes it to ``found.json``, where
the benchmark finds it, and the report is kept as ``docs/results/learning_search.json``. Without ``--grid`` the rate is
tried at 1/2, 1 and 2 of its present value. Points are trained for the whole of ``--budget``, with a schedule that ends
there. The test set is never looked at. ``--report-only`` without ``--only`` reports on all rows of the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedzo.protocol.errors import ConfigError, FedzoError

from ..report import Report
from .cells import Cell
from .data import FILES
from .jobs import read_rows, run_cells
from .options import add_options, changes, numbers, value_of
from .settings import BUDGETS, FOUND, resolved

__all__ = ["best", "points"]

_FACTORS = (0.5, 1.0, 2.0)


def points(cell: Cell, grid: Mapping[str, Sequence[Any]]) -> list[Cell]:
    """The cell at every point of the grid; by default at half and twice its rate too."""
    if not grid:
        rate = float(cell.settings["learning_rate"])
        grid = {"learning_rate": [float(f"{factor * rate:.3g}") for factor in _FACTORS]}
    combinations = itertools.product(*grid.values())
    return [
        dataclasses.replace(cell, settings={**cell.settings, **dict(zip(grid, values, strict=True))})
        for values in combinations
    ]


def best(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For every group the point with the highest median accuracy; a run that failed counts as 0.

    Args:
        rows: Of the search.
        names: Settings that make a point.
    """
    found = {}
    for group, medians in point_medians(rows, names).items():
        winner = max(medians, key=lambda point: medians[point])
        found[group] = {name: value for name, value in json.loads(winner).items() if value is not None}
    return found


def point_medians(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """For every group the median accuracy of each point, which is written as JSON.

    Longer runs learn more, so points are only compared at one budget: the largest at which there are several.
    """
    tried: dict[str, dict[float, dict[str, list[float]]]] = {}
    for row in rows:
        group, budget, _ = row["key"].rsplit("/", 2)
        point = json.dumps({name: row["settings"].get(name) for name in names}, sort_keys=True)
        by_point = tried.setdefault(group, {}).setdefault(BUDGETS[budget] * row.get("scale", 1.0), {})
        by_point.setdefault(point, []).append(row["accuracy"] or 0.0)
    found = {}
    for group, budgets in tried.items():
        points_there = budgets[max(budgets, key=lambda budget: (len(budgets[budget]) > 1, budget))]
        found[group] = {point: statistics.median(values) for point, values in points_there.items()}
    return found


def varied(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings that are not the same in all rows of a group."""
    seen: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        for name, value in row["settings"].items():
            seen.setdefault((row["key"].rsplit("/", 2)[0], name), set()).add(json.dumps(value))
    return sorted({name for (_, name), values in seen.items() if len(values) > 1})


def _grid(entries: Sequence[str]) -> dict[str, list[Any]]:
    found = {}
    for entry in entries:
        name, sign, values = entry.partition("=")
        if not sign:
            raise ConfigError(f"{entry!r} is not NAME=VALUE,VALUE")
        found[name] = [value_of(value) for value in values.split(",")]
    return found


def _cells(options: argparse.Namespace) -> list[Cell]:
    if options.budget not in BUDGETS:
        raise ConfigError(f"the budget {options.budget!r} is none of {', '.join(BUDGETS)}")
    if not options.only and options.report_only:
        return []
    if not options.only:
        raise ConfigError("no group is named", hint="--only fashion_mnist/ours/dense/main")
    grid, found = _grid(options.grid), []
    for group in options.only:
        names = group.split("/")
        if len(names) != 4 or names[0] not in FILES:
            raise ConfigError(f"{group!r} is no group", hint="DATA/METHOD/MASK/WORLD, as digits/ours/dense/main")
        data, method, mask, world = names
        settings = resolved(data, method, mask, world, changes(options.set))
        for seed in numbers(options.seeds):
            cell = Cell(data, method, mask, world, options.budget, seed, options.budget_scale, "validation", settings)
            found += points(cell, grid)
    return found


def _run(options: argparse.Namespace) -> int:
    cells = _cells(options)
    if options.report_only:
        rows = read_rows(options.resume) if options.resume else []
    else:
        with tempfile.TemporaryDirectory() as folder:
            work = options.work or Path(folder)
            rows = run_cells(
                cells, options.data_folder, work, jobs=options.jobs, resume=options.resume, done=lambda _: True
            )
    if cells:
        good = [row for row in rows if any(cell.is_of(row) for cell in cells)]
        names = list(_grid(options.grid)) or ["learning_rate"]
    else:
        good = [row for row in rows if row["part"] == "validation"]
        names = varied(good)
    winners = best(good, names)
    if options.adopt:
        stored = json.loads(FOUND.read_text(encoding="utf-8")) if FOUND.exists() else {}
        for group, settings in winners.items():
            stored[group] = {**stored.get(group, {}), **settings}
        FOUND.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    columns = ("key", "budget_sf", "accuracy", "sample_forwards", "settings", "error")
    shown = [{name: row.get(name) for name in columns} for row in good]
    if not options.json:
        shown = [{"key": r["key"], **{n: r["settings"].get(n) for n in names}, "accuracy": r["accuracy"]} for r in good]
        shown.sort(key=lambda row: (row["key"], -(row["accuracy"] or 0.0)))
    told = {
        "budget": options.budget,
        "budget_scale": options.budget_scale,
        "seeds": options.seeds,
        "best": winners,
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
    }
    tops = {f"{group}_validation": 100 * max(each.values()) for group, each in point_medians(good, names).items()}
    Report(told, shown, tops).write(as_json=options.json)
    return 0


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.set_defaults(seeds="0")
    parser.add_argument("--grid", nargs="+", default=[], metavar="NAME=A,B", help="as learning_rate=1e-3,3e-3 k=4,8")
    parser.add_argument("--budget", default="300k", help="SF of each run (default %(default)s)")
    parser.add_argument("--adopt", action="store_true", help="write the best points to found.json")
    parser.add_argument(
        "--report-only", action="store_true", help="report on the rows that are there, all of them without --only"
    )
    options = parser.parse_args()
    try:
        return _run(options)
    except FedzoError as error:
        print(f"error: {error.message}" + (f" ({error.hint})" if error.hint else ""), file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())

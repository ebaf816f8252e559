"""Every method, dense and pruned, with IID data and with Dirichlet 0.1, for one budget of sample-forwards.

The cells are those of ``benchmarks/learning``, with its settings and what its search found: LeNet-5, 50 devices, 16 a
round. ``baseline`` is BAFFLE's form, ``decomfl`` DeComFL's, ``ours`` the best zeroth-order estimator, ``local`` the one
with a loss for each stage (forward passes only, not zeroth-order), ``fedavg`` federated averaging with backpropagation
in torch. Passes of pruning are not in the budget. CIFAR-100 runs when ``--data`` names its file.
"""

from __future__ import annotations

import statistics
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..protocol.errors import ConfigError
from .experiment import Experiment
from .pictures import COLOURS
from .report import Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT"]

METHODS = ("baseline", "decomfl", "ours", "local", "fedavg")
MASKS = ("dense", "pruned80", "pruned90")
WORLDS = ("iid50", "dirichlet01")
_KEPT = (
    "data",
    "method",
    "mask",
    "world",
    "seed",
    "accuracy",
    "sample_forwards",
    "pruning_sample_forwards",
    "rounds",
    "loss_queries",
    "bytes_up_per_device_round",
    "bytes_down_per_device_round",
    "seconds",
)


def add_options(parser: ArgumentParser) -> None:
    """What is run, and where its rows go."""
    parser.add_argument("--budget", default="600k", help="sample-forwards of a cell (default: %(default)s)")
    parser.add_argument("--budget-scale", type=float, default=1.0, help="part of it (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS), help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side (default: %(default)s)")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="rows, one a line: read, and appended to")
    parser.add_argument("--work", type=Path, help="folder that cells share (default: a temporary one)")


def measure(options: Namespace) -> Report:
    """All cells that have no row yet.

    Raises:
        ConfigError: A name is unknown, or this is no clone of the repository.
        FedzoError: See the cells.
    """
    try:
        from benchmarks.learning.cells import Cell
        from benchmarks.learning.data import FILES
        from benchmarks.learning.jobs import run_cells
        from benchmarks.learning.settings import BUDGETS, resolved
    except ImportError as error:
        raise ConfigError(f"the cells cannot be found: {error}", hint="run it in a clone of the repository") from None
    sets = _files(options.data, FILES)
    if options.budget not in BUDGETS:
        raise ConfigError(f"the budget {options.budget!r} is none of {', '.join(BUDGETS)}")
    cells = [
        Cell(
            data, method, mask, world, options.budget, seed, options.budget_scale, "test",
            resolved(data, method, mask, world),
        )
        for seed in range(options.seeds)
        for data in sets
        for method in options.methods
        for mask in options.masks
        for world in WORLDS
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        for name, file in sets.items():
            if file is not None:
                (source / FILES[name][0]).symlink_to(file.absolute())
        work = options.work or Path(folder) / "work"
        rows = run_cells(cells, source, work, jobs=options.jobs, resume=options.resume)
    latest = {row["key"]: row for row in rows if row.get("accuracy") is not None and any(c.is_of(row) for c in cells)}
    kept = [_short(latest[cell.key]) for cell in cells if cell.key in latest]
    settings = {
        "model": "lenet5",
        "data": list(sets),
        "seeds": list(range(options.seeds)),
        "budget_sf": cells[0].budget_sf,
        "devices": 50,
        "participants": 16,
        "methods": options.methods,
        "masks": options.masks,
        "of_each": {cell.group: dict(cell.settings) for cell in cells},
        "not_run": [name for name in FILES if name not in sets],
        "failed": [cell.key for cell in cells if cell.key not in latest],
    }
    figures = {}
    for (data, method, mask, world), value in _medians(kept).items():
        figures[f"{data}_{method}_{mask}_{world}"] = 100 * value
    return Report.made(settings, kept, figures)


def _files(entries: Sequence[str], known: Mapping[str, Any]) -> dict[str, Path | None]:
    found: dict[str, Path | None] = {}
    for entry in entries:
        name, sign, file = entry.partition("=")
        if name not in known or (not sign and name != "digits"):
            raise ConfigError(f"the data set is {entry!r}", hint=f"digits, or NAME=FILE with {', '.join(known)}")
        if file and not Path(file).is_file():
            raise ConfigError(f"there is no file {file}")
        found[name] = Path(file) if file else None
    return found


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: row.get(name) for name in _KEPT}, "learning_rate": row["settings"]["learning_rate"]}


def _medians(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str, str], float]:
    found: dict[tuple[str, str, str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["data"], row["method"], row["mask"], row["world"]), []).append(row["accuracy"])
    return {names: statistics.median(values) for names, values in found.items()}


def draw(report: Report, figure: Figure) -> None:
    """Bars of accuracy by method and mask, one panel a data set and world."""
    settings, medians = report.settings, _medians(report.rows)
    panels = figure.subplots(len(settings["data"]), len(WORLDS), squeeze=False, sharey="row")
    for line, data in zip(panels, settings["data"], strict=True):
        for panel, world in zip(line, WORLDS, strict=True):
            for place, mask in enumerate(settings["masks"]):
                heights = [100 * medians.get((data, method, mask, world), 0.0) for method in settings["methods"]]
                wide = 0.8 / len(settings["masks"])
                at = [number + (place - (len(settings["masks"]) - 1) / 2) * wide for number in range(len(heights))]
                panel.bar(at, heights, wide, color=COLOURS[place], label=mask)
            panel.set_xticks(range(len(settings["methods"])), settings["methods"])
            panel.set_title(f"{data}, {world}")
            panel.set_ylabel("test accuracy, %")
    panels[0][0].legend()


def table(report: Report) -> Table:
    """Median accuracy by data set, method, mask and world."""
    settings, medians = report.settings, _medians(report.rows)
    out = [["data", "method", *(f"{mask}, {world}" for mask in settings["masks"] for world in WORLDS)]]
    for data in settings["data"]:
        for method in settings["methods"]:
            values = [medians.get((data, method, mask, world)) for mask in settings["masks"] for world in WORLDS]
            out.append([data, method, *("" if value is None else f"{value:.1%}" for value in values)])
    return out


EXPERIMENT = Experiment(
    "methods side by side: dense and pruned, IID and Dirichlet 0.1", add_options, measure, draw, table, (9.0, 5.4)
)

"""What do hostile devices cost, and which rule of aggregation keeps how much accuracy?

Whole runs of the simulation with LeNet-5 on IID data; some of the devices report what an attack makes of the honest
reports (``attackers.py``). ``stein`` shares its directions, ``node`` mostly sketches. Every rule has the learning rate
that suits the mean without an attack. ``dealt`` are the same runs of ``stein`` with directions of their own for every
device, which leave only the mean and clipping; attacks that aim at single scalars of others have no object there.
"""

from __future__ import annotations

import json
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..protocol.errors import ConfigError, FedzoError
from ..protocol.server_side.aggregation_rules import AggregationSettings
from ..protocol.settings import RunSettings, TrainingSettings
from ..simulation.settings import SimulationSettings
from ..simulation.simulate import simulate
from .attackers import ATTACKS, COLLUDING, HostilePool
from .data import Images, load_images
from .experiment import Experiment
from .lab import check_splits, exported_folder
from .report import Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..simulation.clients import Source

__all__ = ["EXPERIMENT"]

Rows = list[dict[str, Any]]
NONE = "none"
DEFENCES: dict[str, tuple[str, str]] = {
    "mean": ("mean", "none"),
    "mean, norm clip": ("mean", "norm"),
    "mean, value clip": ("mean", "value"),
    "median": ("median", "none"),
    "trimmed-mean": ("trimmed-mean", "none"),
    "krum": ("krum", "none"),
    "multi-krum": ("multi-krum", "none"),
    "sign-vote": ("sign-vote", "none"),
    "centred-clip": ("centred-clip", "none"),
}
RUNS: dict[str, dict[str, Any]] = {
    "stein": {"rounds": 30, "k": 64, "batch": 16, "learning_rate": 0.03, "assignment": "shared"},
    "dealt": {"rounds": 30, "k": 64, "batch": 16, "learning_rate": 0.03},
    "node": {
        "rounds": 60,
        "estimator": "node",
        "assignment": "shared",
        "k": 4,
        "tail_k": 512,
        "repeats": 4,
        "probe_batch": 4,
        "batch": 8,
        "sigma": 3e-3,
        "learning_rate": 0.02,
    },
}
"""Training of each kind of run."""

FEWER: dict[str, Sequence[str]] = {"node": ("mean", "median", "centred-clip")}
"""Rules of the kinds of run that take longest, and are not tried with skewed data."""

SIDE = 16
"""Of the images, which are thinned out to it: every run is short, and there are many."""


def add_options(parser: ArgumentParser) -> None:
    """Options of this experiment."""
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), help="default: all")
    parser.add_argument("--rules", nargs="+", choices=list(DEFENCES), default=list(DEFENCES), help="default: all")
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS), help="default: all")
    parser.add_argument("--devices", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--hostile", type=int, default=3, help="how many of them (default: %(default)s)")
    parser.add_argument("--rounds-scale", type=float, default=1.0, help="part of the rounds (default: %(default)s)")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="rows, one a line: read, and appended to")
    parser.add_argument("--skew", default="dirichlet:0.3", help="of runs without an attack besides; iid for none")


def _rule(name: str, hostile: int) -> AggregationSettings:
    rule, clip = DEFENCES[name]
    return AggregationSettings(rule, 0 if rule == "mean" else hostile, clip)  # type: ignore[arg-type]  # from above


def _thinned(images: NDArray[np.float32]) -> NDArray[np.float32]:
    step = max(1, images.shape[-1] // SIDE)
    return np.ascontiguousarray(images[:, :, ::step, ::step])


def _cells(options: Namespace) -> list[tuple[str, str, str, str]]:
    """``(run, rule, attack, split)`` of everything that is run for a seed."""
    cells = []
    for run in options.runs:
        for rule in options.rules:
            if (run == "dealt" and _rule(rule, 1).compares) or rule not in FEWER.get(run, options.rules):
                continue
            wanted = [name for name in options.attacks if run != "dealt" or name not in COLLUDING]
            cells += [(run, rule, attack, "iid") for attack in (NONE, *wanted)]
            if options.skew != "iid" and run not in FEWER:
                cells.append((run, rule, NONE, options.skew))
    return cells


def _runs(images: Images, options: Namespace, seed: int, kind: str, known: dict[str, dict[str, Any]]) -> Rows:
    """All runs of one kind and seed; those that are known are taken as they are."""
    cells = [cell for cell in _cells(options) if cell[0] == kind]
    keys = {cell: _key(images.name, options, seed, cell) for cell in cells}
    if any(key not in known for key in keys.values()):
        data = (_thinned(images.x), images.y), (_thinned(images.xt), images.yt)
        with exported_folder("lenet5", data[0][0].shape[1:], images.n_classes, seed, sparsity=0.0) as folder:
            for cell, key in keys.items():
                if key not in known:
                    known[key] = _one(images, data, folder, options, seed, cell)
                    _keep(options.resume, key, known[key])
    return [known[key] for key in keys.values()]


def _key(data: str, options: Namespace, seed: int, cell: tuple[str, str, str, str]) -> str:
    """What a run depends on beside the code."""
    sizes = f"{options.hostile} of {options.devices}, rounds x {options.rounds_scale:g}"
    return "/".join([data, *cell, f"seed {seed}", sizes])


def _known(file: Path | None) -> dict[str, dict[str, Any]]:
    if file is None or not file.exists():
        return {}
    try:
        return dict(json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file} does not hold rows: {error}") from None


def _keep(file: Path | None, key: str, row: dict[str, Any]) -> None:
    if file is not None:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([key, row]) + "\n")


def _one(
    images: Images,
    data: tuple[Source, Source],
    folder: Path,
    options: Namespace,
    seed: int,
    cell: tuple[str, str, str, str],
) -> dict[str, Any]:
    kind, rule, attack, split = cell
    values = {name: value for name, value in RUNS[kind].items() if name != "rounds"}
    rounds = max(1, round(options.rounds_scale * RUNS[kind]["rounds"]))
    settings = RunSettings(
        seed=seed,
        sparsity=0.0,
        training=TrainingSettings(rounds=rounds, **values),
        aggregation=_rule(rule, options.hostile),
        devices=options.devices,
        quorum=options.devices,
        evaluate_every=0,
    )
    pool = HostilePool(ATTACKS.get(attack), range(options.hostile), seed)
    diverged, accuracy, passes = False, 1.0 / images.n_classes, 0.0
    try:
        found = simulate(folder, settings, *data, SimulationSettings(split=split, seed=seed), pool=pool)
    except ConfigError:
        raise
    except FedzoError:
        diverged = True  # weights that are not finite any more, or devices that cannot answer with them
    else:
        accuracy, passes = float(found.accuracy or 0.0), found.sample_forwards
    return {
        "data": images.name,
        "run": kind,
        "rule": rule,
        "attack": attack,
        "split": split,
        "seed": seed,
        "rounds": rounds,
        "accuracy": accuracy,
        "diverged": diverged,
        "sample_forwards": passes,
    }


def measure(options: Namespace) -> Report:
    """Every data set, kind of run, rule, attack and seed."""
    check_splits([options.skew])
    if not 1 <= options.hostile < options.devices / 2 or options.rounds_scale <= 0:
        raise ConfigError(
            f"{options.hostile} hostile devices of {options.devices}", hint="at least 1, and less than half of them"
        )
    sets, cells = load_images(options.data), _cells(options)
    known = _known(options.resume)
    rows = [
        row
        for seed in range(options.seeds)
        for images in sets
        for kind in options.runs
        for row in _runs(images, options, seed, kind, known)
    ]
    settings = {
        "model": "lenet5",
        "side": SIDE,
        "data": [images.name for images in sets],
        "seeds": list(range(options.seeds)),
        "devices": options.devices,
        "hostile": options.hostile,
        "skew": options.skew,
        "runs": {run: RUNS[run] for run in options.runs},
        "rounds_scale": options.rounds_scale,
        "rules": options.rules,
        "attacks": options.attacks,
    }
    report = Report.made(settings, rows, {})
    figures = {}
    for data in settings["data"]:
        for run, rule, attack, split in cells:
            name = f"{data}_{run}_{rule}_{attack if split == 'iid' else 'skewed'}"
            figures[name.replace(",", "").replace(" ", "_").replace("-", "_")] = 100 * (
                _mean(report, data, run, rule, attack, split) or 0.0
            )
    return Report.made(settings, rows, figures)


def _mean(report: Report, data: str, run: str, rule: str, attack: str, split: str) -> float | None:
    wanted = (data, run, rule, attack, split)
    found = [r["accuracy"] for r in report.rows if (r["data"], r["run"], r["rule"], r["attack"], r["split"]) == wanted]
    return statistics.mean(found) if found else None


def _columns(report: Report) -> list[tuple[str, str, str]]:
    """``(heading, attack, split)`` of what is shown side by side."""
    settings = report.settings
    columns = [("no attack", NONE, "iid"), *((name, name, "iid") for name in settings["attacks"])]
    return (
        columns if settings["skew"] == "iid" else [*columns, (f"no attack, {settings['skew']}", NONE, settings["skew"])]
    )


def _kept(report: Report, run: str) -> Sequence[str]:
    """The rules that were tried in this kind of run."""
    return [rule for rule in report.settings["rules"] if any((r["run"], r["rule"]) == (run, rule) for r in report.rows)]


def draw(report: Report, figure: Figure) -> None:
    """Accuracy by rule and attack, one panel a kind of run, of the first data set."""
    settings, columns = report.settings, _columns(report)
    data, runs = settings["data"][0], list(settings["runs"])
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for panel, run in zip(panels, runs, strict=True):
        rules = _kept(report, run)
        values = np.full((len(rules), len(columns)), np.nan)
        for i, rule in enumerate(rules):
            for j, (_, attack, split) in enumerate(columns):
                found = _mean(report, data, run, rule, attack, split)
                if found is not None:
                    values[i, j] = 100 * found
                    dark = found > 0.6
                    panel.text(j, i, f"{100 * found:.0f}", ha="center", va="center", color="white" if dark else "black")
        panel.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        panel.set_xticks(range(len(columns)), [heading for heading, _, _ in columns], rotation=40, ha="right")
        panel.set_yticks(range(len(rules)), rules)
        panel.grid(visible=False)
        panel.set_title(f"{run}: test accuracy, %")
    hostile, devices = settings["hostile"], settings["devices"]
    figure.suptitle(f"LeNet-5, {data}, {hostile} of {devices} devices hostile", fontsize=10)


def table(report: Report) -> Table:
    """Mean accuracy by kind of run, rule and attack."""
    settings, columns = report.settings, _columns(report)
    out = [["data", "run", "rule", *(heading for heading, _, _ in columns)]]
    for data in settings["data"]:
        for run in settings["runs"]:
            for rule in _kept(report, run):
                found = [_mean(report, data, run, rule, attack, split) for _, attack, split in columns]
                out.append([data, run, rule, *("" if value is None else f"{value:.1%}" for value in found)])
    return out


EXPERIMENT = Experiment(
    "accuracy that every rule of aggregation keeps against hostile devices",
    add_options,
    measure,
    draw,
    table,
    (13.0, 5.2),
)

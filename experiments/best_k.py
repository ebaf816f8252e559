"""At a fixed number of loss queries, how many directions should a round have, dense and pruned?

Whole runs of the simulation: ``stein`` with orthogonal directions, dealt. Every cell has a learning rate of its own,
chosen at seed 0 on a tenth of the training set that is kept apart; accuracies are those of the test set after the last
update.
"""

from __future__ import annotations

import statistics
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..protocol.errors import ConfigError
from ..protocol.settings import RunSettings, SaliencySettings, TrainingSettings
from ..simulation.result import SimulationResult
from ..simulation.settings import SimulationSettings
from ..simulation.simulate import simulate
from .data import Images, load_images
from .experiment import Experiment
from .lab import exported_folder
from .pictures import COLOURS
from .report import Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..simulation.clients import Source

__all__ = ["EXPERIMENT", "held_apart", "run"]

SCORED = 16  # Gaussian inputs of every device


def add_options(parser: ArgumentParser) -> None:
    """Options of this experiment."""
    parser.add_argument("--queries", type=int, default=6144, help="of all devices together (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4, 16, 32], help="directions of a device and round")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.8, 0.95], help="of the masks")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2], help="peak learning rates")
    parser.add_argument("--batch", type=int, default=16, help="samples behind a loss (default: %(default)s)")


def held_apart(images: Images) -> tuple[Source, Source]:
    """Nine tenths of the training set, and the rest to choose a learning rate on."""
    cut = len(images.x) // 10
    return (images.x[cut:], images.y[cut:]), (images.x[:cut], images.y[:cut])


def run(
    folder: Path, train: Source, test: Source, training: TrainingSettings, sparsity: float, devices: int, seed: int
) -> SimulationResult:
    """One run on IID data, evaluated at its end."""
    settings = RunSettings(
        seed=seed,
        sparsity=sparsity,
        training=training,
        saliency=SaliencySettings(samples=SCORED, checked=0),
        devices=devices,
        quorum=devices,
        evaluate_every=0,
    )
    return simulate(folder, settings, train, test, SimulationSettings(split="iid", seed=seed, many_queries=False))


def _training(options: Namespace, k: int, rate: float) -> TrainingSettings:
    rounds = max(1, options.queries // (options.devices * (k + 1)))
    return TrainingSettings(rounds=rounds, k=k, batch=options.batch, learning_rate=rate)


def _cell(images: Images, options: Namespace, sparsity: float, k: int) -> list[dict[str, Any]]:
    apart, validation = held_apart(images)
    rows: list[dict[str, Any]] = []

    def one(seed: int, rate: float, train: Source, test: Source, part: str) -> float:
        training = _training(options, k, rate)
        with exported_folder("lenet5", images.shape, images.n_classes, seed, sparsity=sparsity) as folder:
            found = run(folder, train, test, training, sparsity, options.devices, seed)
        accuracy = float(found.accuracy or 0.0)
        rows.append(
            {
                "data": images.name,
                "sparsity": sparsity,
                "k": k,
                "directions": k * options.devices,
                "rounds": training.rounds,
                "rate": rate,
                "seed": seed,
                "part": part,
                "accuracy": accuracy,
                "sample_forwards": found.sample_forwards,
                "scalars_per_device": training.rounds * found.scalars_per_device_round,
            }
        )
        return accuracy

    # Of equal ones the smallest rate.
    best = max(sorted(options.rates), key=lambda rate: one(0, rate, apart, validation, "validation"))
    whole, test = (images.x, images.y), (images.xt, images.yt)
    for seed in range(options.seeds):
        one(seed, best, whole, test, "test")
    return rows


def measure(options: Namespace) -> Report:
    """Every data set, sparsity and K."""
    if min(options.k) < 1 or options.devices < 1 or options.queries < 1:
        raise ConfigError(f"k ({options.k}), devices ({options.devices}) and queries must be 1 or more")
    sets = load_images(options.data)
    rows = [
        row for images in sets for s in options.sparsities for k in options.k for row in _cell(images, options, s, k)
    ]
    settings = {
        "model": "lenet5",
        "data": [images.name for images in sets],
        "seeds": list(range(options.seeds)),
        "queries": options.queries,
        "devices": options.devices,
        "split": "iid",
        "k": options.k,
        "sparsities": options.sparsities,
        "rates": options.rates,
        "batch": options.batch,
        "saliency_samples": SCORED,
        "estimator": "stein, hadamard, dealt, one-sided, sigma 0.001, Adam, cosine",
    }
    report = Report.made(settings, rows, {})
    figures = {}
    for data in settings["data"]:
        for sparsity in options.sparsities:
            accuracies = {k: _median(report, data, sparsity, k) for k in options.k}
            for k, accuracy in accuracies.items():
                figures[f"{data}_sparsity{100 * sparsity:.0f}_k{k}_accuracy"] = 100 * accuracy
            figures[f"{data}_sparsity{100 * sparsity:.0f}_best_k"] = max(options.k, key=lambda k: accuracies[k])
    return Report.made(settings, rows, figures)


def _tests(report: Report, data: str, sparsity: float, k: int) -> list[Any]:
    wanted = (data, sparsity, k, "test")
    return [r for r in report.rows if (r["data"], r["sparsity"], r["k"], r["part"]) == wanted]


def _median(report: Report, data: str, sparsity: float, k: int) -> float:
    return float(statistics.median(row["accuracy"] for row in _tests(report, data, sparsity, k)))


def draw(report: Report, figure: Figure) -> None:
    """Accuracy by directions of a round."""
    settings = report.settings
    panels = figure.subplots(1, len(settings["data"]), squeeze=False)[0]
    for panel, data in zip(panels, settings["data"], strict=True):
        directions = [k * settings["devices"] for k in settings["k"]]
        for colour, sparsity in zip(COLOURS, settings["sparsities"], strict=False):
            values = [100 * _median(report, data, sparsity, k) for k in settings["k"]]
            panel.plot(directions, values, "o-", color=colour, label=f"{100 * sparsity:.0f} % pruned")
            for k, x in zip(settings["k"], directions, strict=True):
                each = [100 * row["accuracy"] for row in _tests(report, data, sparsity, k)]
                panel.plot([x] * len(each), each, ".", color=colour, alpha=0.5)
        panel.set_xscale("log", base=2)
        panel.set_xticks(directions, map(str, directions))
        panel.set_xlabel("directions of a round, all devices")
        panel.set_ylabel("test accuracy, %")
        panel.set_title(f"LeNet-5, {data}, {settings['queries']:,} queries")
        panel.legend()


def table(report: Report) -> Table:
    """Median accuracy (rate) by sparsity and K."""
    settings = report.settings
    out = [["data", "sparsity", *(f"K = {k}" for k in settings["k"])]]
    for data in settings["data"]:
        for sparsity in settings["sparsities"]:
            cells = []
            for k in settings["k"]:
                rate, rounds = (_tests(report, data, sparsity, k)[0][key] for key in ("rate", "rounds"))
                cells.append(f"{_median(report, data, sparsity, k):.1%} (rate {rate:g}, {rounds} rounds)")
            out.append([data, f"{sparsity:.0%}", *cells])
    return out


EXPERIMENT = Experiment(
    "the best number of directions for a sparsity at a fixed number of queries",
    add_options,
    measure,
    draw,
    table,
    (6.0, 3.8),
)

"""What pruning and a query cost on deeper networks: passes, planned memory, measured time, bytes.

ResNet-20, 32 and 56 are built in (3x32x32); ResNet-50 and MobileNetV2 are those of :mod:`.shapes` (3x224x224, 1,000
classes). Times are measured on this machine with one thread; what they add up to in a whole scoring or a training run
is computed from them and marked so (``computed_``). Nothing is trained: the last columns say why.
"""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..edge_runtime.datasets.data import Batch
from ..edge_runtime.estimation.estimators import SteinEstimator
from ..edge_runtime.estimation.saliency import UnitShiftScorer
from ..edge_runtime.inference.engine import Engine
from ..edge_runtime.planning.board_plan import RunSizes, plan_board
from ..edge_runtime.storage.artifact import Artifact
from ..hardware_profiles import list_profiles
from ..protocol.artifact.layout import initial_weights
from ..protocol.artifact.manifest import Manifest, golden_batch
from ..protocol.errors import ConfigError
from ..protocol.perturbation.directions import Directions
from ..protocol.pruning.mask import Mask, threshold
from .experiment import Experiment
from .lab import exported
from .pictures import COLOURS
from .report import Report, Table, text
from .wire_bytes import report_bytes, update_record_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT"]

SMALL, LARGE = ((3, 32, 32), 10, 8), ((3, 224, 224), 1000, 1)  # input, classes, batch of the timings
NETWORKS: dict[str, tuple[str, tuple[tuple[int, ...], int, int]]] = {
    "lenet5": ("lenet5", SMALL),
    "resnet20": ("resnet20", SMALL),
    "resnet32": ("resnet32", SMALL),
    "resnet56": ("resnet56", SMALL),
    "mobilenetv2": (f"{__package__}.shapes:mobilenetv2", LARGE),
    "resnet50": (f"{__package__}.shapes:resnet50", LARGE),
}
SPARSITY = 0.9
MEMORY_MIB = (50, 100, 200, 500, 1000, 2000)
_NO_LIMIT_MIB = 1e6
_QUERIES, _PASSES = 4, 3


def add_options(parser: ArgumentParser) -> None:
    """Options of this experiment."""
    parser.add_argument("--models", nargs="+", default=list(NETWORKS), help="default: all")
    parser.add_argument("--k", type=int, default=64, help="directions of a device (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=8, help="of a round (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=64, help="scored by a device (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=3e6, help="sample-forwards of a run (default: %(default)g)")
    parser.add_argument("--repeats", type=int, default=3, help="of a timing, the median counts (default: %(default)s)")


def _median_s(call: Callable[[], object], repeats: int) -> float:
    call()  # loads the graph, and makes the rows of the directions
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _planned(manifest: Manifest, samples: int) -> dict[str, Any]:
    """Planned peaks with micro-batches of one sample, and the boards on which both phases fit."""
    row: dict[str, Any] = {}
    for name, sparsity in (("dense", 0.0), ("pruned", SPARSITY)):
        sizes = RunSizes(samples=samples, sparsity=sparsity, micro_batch=1)
        for phase in plan_board(manifest, _NO_LIMIT_MIB, sizes).phases:
            row[f"{phase.phase}_{name}_mib"] = phase.memory.planned_peak_mib
    sizes = RunSizes(samples=samples, sparsity=SPARSITY)
    boards = sorted(list_profiles(), key=lambda board: board.ram_budget_mib)
    fits = [board for board in boards if plan_board(manifest, board.ram_budget_mib, sizes).fits]
    training = [board for board in boards if plan_board(manifest, board.ram_budget_mib, sizes).phases[-1].refusal == ""]
    return {
        **row,
        "boards": len(boards),
        "boards_fit": len(fits),
        "boards_fit_training": len(training),
        "smallest_board": fits[0].name if fits else "",
    }


def _timed(artifact: Artifact, mask: Mask, batch: Batch, repeats: int) -> tuple[float, float]:
    """Seconds of one loss query under the mask, and of one scoring pass of the dense network, both of the batch."""
    manifest = artifact.manifest
    dense = initial_weights(manifest.layout, manifest.seed)
    directions = Directions("hadamard", 1, mask.n_survivors)
    estimator, positions = SteinEstimator(directions, 2.0**-10), np.arange(_QUERIES, dtype=np.int64)
    weights = np.ascontiguousarray(dense[mask.kept])
    with Engine(artifact, mask, micro_batch=len(batch)) as engine:
        query_s = _median_s(lambda: estimator.probe(engine, weights, batch, 0, positions), repeats) / (_QUERIES + 1)
    shift = np.zeros(manifest.n_units, np.float32)
    with Engine(artifact, Mask.dense(manifest.layout), micro_batch=len(batch)) as engine:
        np.copyto(engine.weights_feed, dense)
        shift[0] = 1e-2

        def passes() -> None:
            for _ in range(_PASSES):
                engine.shifted_logits(engine.weights_feed, batch.x, shift)

        pass_s = _median_s(passes, repeats) / _PASSES
    return query_s, pass_s


def _one(name: str, options: Namespace) -> dict[str, Any]:
    model, (shape, n_classes, batch) = NETWORKS[name]
    start = time.perf_counter()
    with exported(model, shape, n_classes, 0, sparsity=SPARSITY) as artifact:
        export_s = time.perf_counter() - start
        manifest = artifact.manifest
        layout = manifest.layout
        mask = threshold(layout, np.abs(initial_weights(layout, 0)), SPARSITY)
        query_s, pass_s = _timed(artifact, mask, Batch(*golden_batch(shape, n_classes, 0, batch)), options.repeats)
    passes = UnitShiftScorer(manifest).passes
    work = manifest.work
    return {
        "model": name,
        "input": "x".join(map(str, shape)),
        "classes": n_classes,
        "parameters": layout.size,
        "layers": len(manifest.units),
        "multiply_accumulates": work.sample_multiply_accumulates if work else None,
        "export_s": export_s,
        "passes": passes,
        **_planned(manifest, options.samples),
        "batch": batch,
        "query_ms_per_sample": 1e3 * query_s / batch,
        "pass_ms_per_sample": 1e3 * pass_s / batch,
        "computed_scoring_s": passes * options.samples * pass_s / batch,
        "survivors": mask.n_survivors,
        "report_bytes": report_bytes(options.k),
        "update_bytes": update_record_bytes(options.devices * options.k),
        "mask_bytes": len(mask.encode()),
        "weights_bytes": 4 * layout.size,
        "computed_training_h": options.budget * query_s / batch / 3600,
        "computed_cos2": options.k * options.devices / mask.n_survivors,
    }


def measure(options: Namespace) -> Report:
    """Every network."""
    unknown = set(options.models) - set(NETWORKS)
    if unknown:
        raise ConfigError(f"there is no network {min(unknown)!r}; there are {', '.join(NETWORKS)}")
    if min(options.k, options.devices, options.samples, options.repeats) < 1:
        raise ConfigError("k, devices, samples and repeats must be 1 or more")
    rows = [_one(name, options) for name in options.models]
    figures = {}
    for row in rows:
        for key in (
            "parameters",
            "passes",
            "scoring_pruned_mib",
            "training_dense_mib",
            "training_pruned_mib",
            "query_ms_per_sample",
            "computed_scoring_s",
            "computed_training_h",
        ):
            figures[f"{row['model']}_{key}"] = row[key]
    settings = {
        "models": options.models,
        "sparsity": SPARSITY,
        "mask": "magnitude",
        "k": options.k,
        "devices": options.devices,
        "samples": options.samples,
        "budget_sample_forwards": options.budget,
        "repeats": options.repeats,
        "threads": 1,
        "memory": "planned peaks with micro-batches of 1, portable graphs, no data set in memory",
        "seeds": [0],
    }
    return Report.made(settings, rows, figures)


def draw(report: Report, figure: Figure) -> None:
    """Memory and time."""
    memory, times = figure.subplots(1, 2)
    names = [row["model"] for row in report.rows]
    places = np.arange(len(names))
    series = (
        ("scoring, dense", "scoring_pruned_mib"),
        ("training, dense", "training_dense_mib"),
        ("training, 90 % pruned", "training_pruned_mib"),
    )
    for number, (label, key) in enumerate(series):
        values = [row[key] for row in report.rows]
        memory.plot(places, values, "os^"[number], color=COLOURS[number], label=label)
    memory.set_ylabel("planned peak of a device, MiB")
    sums = (
        ("one query of one sample, measured", "query_ms_per_sample", 1e-3),
        ("scoring 64 inputs, computed", "computed_scoring_s", 1.0),
        ("3 M sample-forwards, computed", "computed_training_h", 3600.0),
    )
    for number, (label, key, scale) in enumerate(sums):
        values = [scale * row[key] for row in report.rows]
        times.plot(places, values, "os^"[number], color=COLOURS[number], label=label)
    times.set_ylabel("seconds, one thread of this machine")
    for axes in (memory, times):
        axes.set_yscale("log")
        axes.set_xticks(places, names, rotation=20)
        axes.legend()
    memory.set_yticks(MEMORY_MIB, map(str, MEMORY_MIB))
    memory.minorticks_off()


def table(report: Report) -> Table:
    """One row a network."""
    head = [
        "model",
        "weights",
        "MMAC a sample",
        "passes",
        "scoring, MiB",
        "training dense / 90 %, MiB",
        "boards that fit",
        "query, ms a sample",
        "scoring, s (computed)",
        "report / update / mask / weights, bytes",
        "3 M SF, hours (computed)",
    ]
    out = [head]
    for row in report.rows:
        work = row["multiply_accumulates"]
        sizes = " / ".join(f"{row[key]:,}" for key in ("report_bytes", "update_bytes", "mask_bytes", "weights_bytes"))
        out.append(
            [
                row["model"],
                f"{row['parameters']:,}",
                f"{work / 1e6:,.1f}" if work else "",
                f"{row['passes']:,}",
                f"{row['scoring_pruned_mib']:.0f}",
                f"{row['training_dense_mib']:.0f} / {row['training_pruned_mib']:.0f}",
                f"{row['boards_fit']} of {row['boards']}",
                text(float(row["query_ms_per_sample"])),
                f"{row['computed_scoring_s']:,.1f}",
                sizes,
                text(float(row["computed_training_h"])),
            ]
        )
    return out


EXPERIMENT = Experiment(
    "cost of scoring and of a query on deeper networks", add_options, measure, draw, table, (10.0, 4.0)
)

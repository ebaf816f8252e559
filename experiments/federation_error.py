"""How far is the estimated global gradient from the true one, by number of devices and skew of their data?

Every device of a split has a batch of its own, drawn as in a run. ``exact`` averages the devices' exact gradients: what
is left is sampling and skew. ``dealt`` and ``shared`` average estimates from differences of losses, with directions of
their own for every device or the same for all. The reference is the gradient of the data of all devices. Rows of ``n``
devices are means over all disjoint groups of ``n`` out of the devices of the split.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..edge_runtime.datasets.data import Batch, batch_indices
from ..edge_runtime.estimation.estimators import SteinEstimator
from ..edge_runtime.inference.engine import Engine
from ..protocol.artifact.layout import initial_weights
from ..protocol.errors import ConfigError
from ..protocol.perturbation.directions import Directions
from ..protocol.perturbation.streams import Purpose, permutation
from .data import Images, load_images
from .experiment import Experiment
from .lab import check_splits, combined, dealt, exported, gaussian_mask
from .metrics import cosine_squared, relative_error
from .pictures import COLOURS
from .report import Report, Table, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT"]

SPLITS = ("dirichlet:0.1", "dirichlet:0.5", "dirichlet:1", "iid")
KINDS = ("exact", "dealt", "shared")
SAMPLES = 4096  # behind the reference, at most


def add_options(parser: ArgumentParser) -> None:
    """Options of this experiment."""
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="of a round")
    parser.add_argument("--k", type=int, default=64, help="directions of a device (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="samples behind a loss (default: %(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.8, help="of the mask (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of backpropagation before (default: %(default)s)")
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), help="default: %(default)s")
    parser.add_argument("--sigma", type=float, default=2.0**-10, help="length of a perturbation")


def _one_seed(images: Images, options: Namespace, seed: int) -> list[dict[str, Any]]:
    from .backprop import exact_gradient, trained

    rows: list[dict[str, Any]] = []
    most = max(options.devices)
    with exported("lenet5", images.shape, images.n_classes, seed) as artifact:
        manifest = artifact.manifest
        initial = initial_weights(manifest.layout, manifest.seed)
        mask = gaussian_mask(artifact, initial, options.sparsity, seed)
        dense = trained(manifest, mask, initial, images.x, images.y, steps=options.steps, seed=seed)
        weights = np.ascontiguousarray(dense[mask.kept])
        some = permutation(seed, Purpose.BATCH, 0, 0, len(images.x)).astype(np.int64)[:SAMPLES]
        reference = exact_gradient(manifest, dense, images.x[some], images.y[some])[mask.kept]
        directions = Directions("hadamard", seed, mask.n_survivors)
        estimator = SteinEstimator(directions, options.sigma)
        with Engine(artifact, mask, micro_batch=32) as engine:
            for split in options.splits:
                parts = dealt(split, images.y, most, seed)
                found = {what: np.empty((most, mask.n_survivors)) for what in KINDS}
                for device, part in enumerate(parts):
                    chosen = part[batch_indices(seed, 0, device, len(part), options.batch)]
                    batch = Batch(np.ascontiguousarray(images.x[chosen]), images.y[chosen])
                    found["exact"][device] = exact_gradient(manifest, dense, batch.x, batch.y)[mask.kept]
                    for what, first in (("dealt", device * options.k), ("shared", 0)):
                        positions = np.arange(first, first + options.k, dtype=np.int64)
                        scalars = estimator.probe(engine, weights, batch, 0, positions).values
                        found[what][device] = combined(directions, 0, positions, scalars)
                for n in options.devices:
                    for what in KINDS:
                        # Every n devices in turn are a round of their own; the row is the mean over these.
                        means = [found[what][start : start + n].mean(0) for start in range(0, most - n + 1, n)]
                        rows.append(
                            {
                                "data": images.name,
                                "seed": seed,
                                "split": split,
                                "devices": n,
                                "estimate": what,
                                "survivors": mask.n_survivors,
                                "rounds": len(means),
                                "relative_error": float(np.mean([relative_error(mean, reference) for mean in means])),
                                "cos2": float(np.mean([cosine_squared(mean, reference) for mean in means])),
                            }
                        )
    return rows


def measure(options: Namespace) -> Report:
    """Every data set, seed, split and number of devices."""
    if min(options.devices) < 1 or options.k < 1 or options.batch < 1:
        raise ConfigError(f"devices ({options.devices}), k ({options.k}) and batch ({options.batch}) must be 1 or more")
    check_splits(options.splits)
    sets = load_images(options.data)
    rows = [row for images in sets for seed in range(options.seeds) for row in _one_seed(images, options, seed)]
    settings = {
        "model": "lenet5",
        "data": [images.name for images in sets],
        "seeds": list(range(options.seeds)),
        "devices": options.devices,
        "k": options.k,
        "batch": options.batch,
        "sparsity": options.sparsity,
        "steps": options.steps,
        "splits": options.splits,
        "sigma": options.sigma,
        "directions": "hadamard",
        "one_sided": True,
    }
    report = Report.made(settings, rows, {})
    figures = {}
    for data in settings["data"]:
        for split in options.splits:
            for what in KINDS:
                for devices in (min(options.devices), max(options.devices)):
                    name = f"{data}_{split.replace(':', '').replace('.', '')}_{what}_{devices}_devices"
                    figures[f"{name}_error"] = _mean(report, data, split, devices, what, "relative_error")
                    figures[f"{name}_cos2"] = _mean(report, data, split, devices, what, "cos2")
    return Report.made(settings, rows, figures)


def _mean(report: Report, data: str, split: str, devices: int, what: str, key: str) -> float:
    wanted = (data, split, devices, what)
    return float(
        np.mean([r[key] for r in report.rows if (r["data"], r["split"], r["devices"], r["estimate"]) == wanted])
    )


def draw(report: Report, figure: Figure) -> None:
    """Exact averages on the left, estimates on the right, of the first data set."""
    settings = report.settings
    data, counts = settings["data"][0], settings["devices"]
    exact, estimated = figure.subplots(1, 2)
    for colour, split in zip(COLOURS, settings["splits"], strict=False):
        values = [_mean(report, data, split, n, "exact", "cos2") for n in counts]
        exact.plot(counts, values, "o-", color=colour, label=split)
        for what, style in (("dealt", "s-"), ("shared", "^--")):
            values = [_mean(report, data, split, n, what, "cos2") for n in counts]
            estimated.plot(counts, values, style, color=colour)
    for style, label in (("s-", "dealt directions"), ("^--", "shared directions")):
        estimated.plot([], [], style, color="black", label=label)
    exact.set_title(f"exact gradients, LeNet-5, {data}")
    estimated.set_title(f"{settings['k']} differences of losses a device")
    exact.set_ylabel("squared cosine with the global gradient")
    estimated.set_yscale("log")
    exact.set_ylim(0, 1)
    for axes in (exact, estimated):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, map(str, counts))
        axes.set_xlabel("devices of the round")
        axes.legend()


def table(report: Report) -> Table:
    """Squared cosine (relative error), fewest and most devices."""
    settings = report.settings
    ends = (min(settings["devices"]), max(settings["devices"]))
    head = [f"{what}, {n} device{'s' if n > 1 else ''}" for what in KINDS for n in ends]
    out = [["data", "split", *head]]
    for data in settings["data"]:
        for split in settings["splits"]:
            cells = []
            for what in KINDS:
                for n in ends:
                    cos2, error = (_mean(report, data, split, n, what, key) for key in ("cos2", "relative_error"))
                    cells.append(f"{text(cos2)} ({error:.2f})")
            out.append([data, split, *cells])
    return out


EXPERIMENT = Experiment(
    "error of the global gradient by number of devices and skew of their data", add_options, measure, draw, table
)

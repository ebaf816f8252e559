"""Do Gaussian inputs make federated pruning independent of how the data are spread, and what does that cost?

Half of the training set is dealt to devices, each scores its samples by forward passes, the server pools the first
``n`` of them. The reference of the real kind pools as many IID batches of the other half, so that the rows of the IID
split are the noise of resampling. The reference of the Gaussian kind pools as many further Gaussian batches.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..edge_runtime.inference.engine import Engine
from ..protocol.artifact.layout import initial_weights
from ..protocol.artifact.manifest import Manifest
from ..protocol.errors import ConfigError
from ..protocol.perturbation.streams import Purpose, permutation
from ..protocol.pruning.mask import Mask, threshold
from ..protocol.pruning.saliency import gaussian_inputs
from .data import Images, load_images
from .experiment import Experiment
from .lab import Scored, check_splits, dealt, exported, pooled_scores, score_inputs
from .metrics import overlap, relative_error, spearman
from .pictures import COLOURS
from .report import Report, Table, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT"]

SPLITS = ("dirichlet:0.1", "dirichlet:0.5", "dirichlet:1", "iid")
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
GAUSSIAN, BIAS = "gaussian", "gaussian for real"


def add_options(parser: ArgumentParser) -> None:
    """Options of this experiment."""
    parser.add_argument("--devices", type=int, default=16, help="that score (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=64, help="a device, at most (default: %(default)s)")
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), help="default: %(default)s")


def compared(manifest: Manifest, estimate: NDArray[np.float32], reference: NDArray[np.float32]) -> dict[str, float]:
    """Relative error, rank correlation and overlaps of masks of two scores."""
    maskable = manifest.layout.maskable()
    row = {
        "relative_error": relative_error(estimate[maskable], reference[maskable]),
        "spearman": spearman(estimate[maskable], reference[maskable]),
    }
    for sparsity in SPARSITIES:
        masks = (threshold(manifest.layout, scores, sparsity) for scores in (estimate, reference))
        row[f"iou{100 * sparsity:.0f}"] = overlap(*masks)
    return row


def _sizes(devices: int) -> list[int]:
    return [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < devices] + [devices]


def _one_seed(images: Images, options: Namespace, seed: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    order = permutation(seed, Purpose.HOLDOUT, 0, 1, len(images.x)).astype(np.int64)
    mine, others = np.sort(order[: len(order) // 2]), order[len(order) // 2 :]
    with exported("lenet5", images.shape, images.n_classes, seed) as artifact:
        manifest = artifact.manifest
        weights = initial_weights(manifest.layout, manifest.seed)
        with Engine(artifact, Mask.dense(manifest.layout), micro_batch=64) as engine:

            def scored(batches: Sequence[NDArray[np.float32]]) -> list[Scored]:
                return [score_inputs(engine, weights, batch) for batch in batches]

            def add(inputs: str, found: Sequence[Scored], reference: NDArray[np.float32]) -> None:
                for n in _sizes(len(found)):
                    # Of a single device the mean over all of them; of more the first ones.
                    groups = [[one] for one in found] if n == 1 else [found[:n]]
                    each = [compared(manifest, pooled_scores(manifest, weights, group), reference) for group in groups]
                    means = {key: float(np.mean([row[key] for row in each])) for key in each[0]}
                    rows.append({"data": images.name, "seed": seed, "inputs": inputs, "devices": n, **means})

            drawn = np.array_split(others[: options.devices * options.samples], options.devices)
            real = pooled_scores(manifest, weights, scored([images.x[part] for part in drawn]))
            for split in options.splits:
                parts = dealt(split, images.y[mine], options.devices, seed)
                batches = []
                for device, part in enumerate(parts):
                    chosen = permutation(seed, Purpose.BATCH, 0, device, len(part)).astype(np.int64)[: options.samples]
                    batches.append(images.x[mine[part[chosen]]])
                add(split, scored(batches), real)
            normal = [
                gaussian_inputs(manifest, seed, 0, index, options.samples) for index in range(2 * options.devices)
            ]
            reference = pooled_scores(manifest, weights, scored(normal[options.devices :]))
            add(GAUSSIAN, scored(normal[: options.devices]), reference)
            bias = compared(manifest, reference, real)
            rows.append({"data": images.name, "seed": seed, "inputs": BIAS, "devices": options.devices, **bias})
    return rows


def measure(options: Namespace) -> Report:
    """Every data set, seed and split."""
    check_splits(options.splits)
    if min(options.devices, options.samples) < 1:
        raise ConfigError(f"devices ({options.devices}) and samples ({options.samples}) must be 1 or more")
    sets = load_images(options.data)
    rows = [row for images in sets for seed in range(options.seeds) for row in _one_seed(images, options, seed)]
    figures: dict[str, float] = {}
    for images in sets:
        for inputs in (*options.splits, GAUSSIAN, BIAS):
            mine = [row for row in rows if (row["data"], row["inputs"]) == (images.name, inputs)]
            name = f"{images.name}_{inputs.replace(':', '').replace('.', '').replace(' ', '_')}"
            for end, n in (("one", 1), ("all", options.devices)):
                chosen = [row for row in mine if row["devices"] == n]
                if chosen:
                    figures[f"{name}_{end}_error"] = float(np.mean([row["relative_error"] for row in chosen]))
                    figures[f"{name}_{end}_iou90"] = float(np.mean([row["iou90"] for row in chosen]))
    settings = {
        "model": "lenet5",
        "data": [images.name for images in sets],
        "seeds": list(range(options.seeds)),
        "devices": options.devices,
        "samples_per_device": options.samples,
        "splits": options.splits,
        "shift": 1e-2,
        "draws": 0,
        "sparsities": list(SPARSITIES),
    }
    return Report.made(settings, rows, figures)


def _mean(report: Report, data: str, inputs: str, devices: int, key: str) -> float:
    found = [r[key] for r in report.rows if (r["data"], r["inputs"], r["devices"]) == (data, inputs, devices)]
    return float(np.mean(found))


def draw(report: Report, figure: Figure) -> None:
    """Error and overlap by the number of devices, of the first data set."""
    data = report.settings["data"][0]
    error, iou = figure.subplots(1, 2)
    kinds = (*report.settings["splits"], GAUSSIAN)
    for colour, inputs in zip(COLOURS, kinds, strict=False):
        counts = sorted({r["devices"] for r in report.rows if (r["data"], r["inputs"]) == (data, inputs)})
        style = "s--" if inputs == GAUSSIAN else "o-"
        label = "Gaussian inputs" if inputs == GAUSSIAN else f"real, {inputs}"
        for axes, key in ((error, "relative_error"), (iou, "iou90")):
            values = [_mean(report, data, inputs, n, key) for n in counts]
            axes.plot(counts, values, style, color=colour, label=label)
    everybody = report.settings["devices"]
    bias = _mean(report, data, BIAS, everybody, "iou90")
    iou.axhline(bias, color="black", linestyle=":", label="Gaussian against real")
    for axes in (error, iou):
        axes.set_xscale("log", base=2)
        axes.set_xticks(_sizes(everybody), map(str, _sizes(everybody)))
        axes.set_xlabel("devices whose scores are pooled")
        axes.set_ylim(bottom=0)
    error.set_ylabel("relative error of the score")
    iou.set_ylabel("overlap of the masks at 90 % (IoU)")
    error.set_title(f"LeNet-5, {data}: against a pool of the same kind")
    error.legend()
    iou.legend(loc="lower right")


def table(report: Report) -> Table:
    """One device and all devices, by data set and inputs."""
    everybody = report.settings["devices"]
    out = [
        [
            "data",
            "inputs",
            "error, 1 device",
            "IoU 90 %",
            f"error, {everybody} devices",
            "IoU 90 %",
            "IoU 80 / 95 / 98 %",
        ]
    ]
    for data in report.settings["data"]:
        for inputs in (*report.settings["splits"], GAUSSIAN, BIAS):
            cells = [data, inputs]
            for n in (1, everybody):
                for key in ("relative_error", "iou90"):
                    missing = inputs == BIAS and n == 1
                    cells.append("" if missing else text(_mean(report, data, inputs, n, key)))
            ious = (f"{_mean(report, data, inputs, everybody, key):.2f}" for key in ("iou80", "iou95", "iou98"))
            out.append([*cells, " / ".join(ious)])
    return out


EXPERIMENT = Experiment(
    "saliency scores of real and of Gaussian inputs, under skewed data", add_options, measure, draw, table
)

"""How much do the settings of data-free scoring and of the perturbations matter?

``mask``: masks from Gaussian inputs of other scales, means and numbers, against those of standard normal inputs and of
real ones. ``accuracy``: what networks under such masks learn in a few hundred steps of backpropagation, beside random
masks and those of real inputs. ``sigma``: short zeroth-order runs of the simulation with other lengths of perturbation.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..edge_runtime.inference.engine import Engine
from ..protocol.artifact.layout import initial_weights
from ..protocol.artifact.manifest import Manifest
from ..protocol.errors import FedzoError
from ..protocol.perturbation.streams import Purpose, permutation, uint16s
from ..protocol.pruning.mask import Mask, threshold
from ..protocol.pruning.saliency import gaussian_inputs
from ..protocol.settings import TrainingSettings
from .best_k import run
from .data import Images, load_images
from .experiment import Experiment
from .lab import exported, exported_folder, pooled_scores, score_inputs
from .metrics import overlap
from .pictures import COLOURS
from .report import Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT"]

DISTRIBUTIONS = ((0.1, 0.0), (0.3, 0.0), (1.0, 0.0), (3.0, 0.0), (10.0, 0.0), (1.0, 0.5), (1.0, 2.0))
"""Standard deviation and mean."""
STANDARD = "std 1"
REAL, AGAIN, RANDOM = "real", "std 1, other draw", "random"
TRAINED = ("std 0.1", STANDARD, "std 10", "std 1, mean 2", REAL, RANDOM)
SPARSITY = 0.9
_EMPTY = dict.fromkeys(
    ("iou80", "iou90", "iou98", "iou90_real", "rate", "test_accuracy"),
)


def add_options(parser: ArgumentParser) -> None:
    """Options of this experiment."""
    parser.add_argument("--models", nargs="+", default=["lenet5", "resnet8"], help="of the masks; trained: lenet5")
    parser.add_argument("--samples", type=int, default=64, help="scored; 8 for other models than lenet5")
    parser.add_argument("--counts", type=int, nargs="*", default=[4, 16, 256], help="other numbers of samples")
    parser.add_argument("--steps", type=int, default=400, help="of backpropagation (default: %(default)s)")
    parser.add_argument("--sigmas", type=float, nargs="*", default=[1e-5, 1e-4, 1e-3, 1e-2, 1e-1], help="of runs")
    parser.add_argument("--rounds", type=int, default=150, help="of these runs (default: %(default)s)")


def _name(std: float, mean: float) -> str:
    return f"std {std:g}" + (f", mean {mean:g}" if mean else "")


def _mask_rows(
    model: str, images: Images, options: Namespace, seed: int, found: dict[str, Mask]
) -> list[dict[str, Any]]:
    """Rows of kind ``mask``; the masks at 90 % of LeNet-5 are put into ``found``."""
    samples = options.samples if model == "lenet5" else min(8, options.samples)
    with exported(model, images.shape, images.n_classes, seed) as artifact:
        manifest = artifact.manifest
        weights = initial_weights(manifest.layout, manifest.seed)
        with Engine(artifact, Mask.dense(manifest.layout), micro_batch=64) as engine:

            def scores(x: NDArray[np.float32]) -> NDArray[np.float32]:
                return pooled_scores(manifest, weights, [score_inputs(engine, weights, x)])

            normal = gaussian_inputs(manifest, seed, 0, 0, samples)
            drawn = permutation(seed, Purpose.BATCH, 0, 0, len(images.x)).astype(np.int64)[:samples]
            scored = {
                _name(std, mean): scores(normal * np.float32(std) + np.float32(mean)) for std, mean in DISTRIBUTIONS
            }
            scored[AGAIN] = scores(gaussian_inputs(manifest, seed, 0, 1, samples))
            scored[REAL] = scores(images.x[drawn])
            for count in options.counts if model == "lenet5" else ():
                scored[f"{count} samples"] = scores(gaussian_inputs(manifest, seed, 0, 2, count))
    layout = manifest.layout
    if model == "lenet5":
        found.update({what: threshold(layout, values, SPARSITY) for what, values in scored.items()})
        found[RANDOM] = threshold(layout, _random(manifest, seed), SPARSITY)
    rows = []
    for what, values in scored.items():
        row = {"kind": "mask", "data": images.name, "model": model, "seed": seed, "what": what, **_EMPTY}
        for sparsity in (0.8, 0.9, 0.98):
            own = threshold(layout, values, sparsity)
            row[f"iou{100 * sparsity:.0f}"] = overlap(own, threshold(layout, scored[STANDARD], sparsity))
        row["iou90_real"] = overlap(threshold(layout, values, 0.9), threshold(layout, scored[REAL], 0.9))
        rows.append(row)
    return rows


def _random(manifest: Manifest, seed: int) -> NDArray[np.float32]:
    return uint16s(seed, Purpose.CHANCE, 0, 7, manifest.layout.size).astype(np.float32)


def _accuracy_rows(images: Images, options: Namespace, seed: int, masks: dict[str, Mask]) -> list[dict[str, Any]]:
    from .backprop import accuracy, trained

    rows = []
    with exported("lenet5", images.shape, images.n_classes, seed) as artifact:
        manifest = artifact.manifest
        initial = initial_weights(manifest.layout, manifest.seed)
        for what in TRAINED:
            dense = trained(
                manifest, masks[what], initial, images.x, images.y, steps=options.steps, seed=seed, rate=3e-3
            )
            row = {"kind": "accuracy", "data": images.name, "model": "lenet5", "seed": seed, "what": what, **_EMPTY}
            rows.append({**row, "rate": 3e-3, "test_accuracy": accuracy(manifest, dense, images.xt, images.yt)})
    return rows


def _sigma_rows(images: Images, options: Namespace, seed: int) -> list[dict[str, Any]]:
    rows = []
    for sigma in options.sigmas:
        training = TrainingSettings(rounds=options.rounds, k=8, sigma=sigma, learning_rate=1e-2)
        with exported_folder("lenet5", images.shape, images.n_classes, seed, sparsity=0.8) as folder:
            try:
                found = run(folder, (images.x, images.y), (images.xt, images.yt), training, 0.8, 8, seed)
                reached = found.accuracy
            except FedzoError:  # it diverged
                reached = None
        row = {"kind": "sigma", "data": images.name, "model": "lenet5", "seed": seed, "what": f"{sigma:g}", **_EMPTY}
        rows.append({**row, "rate": 1e-2, "test_accuracy": reached})
    return rows


def measure(options: Namespace) -> Report:
    """Every data set and seed; models other than LeNet-5 at the first seed only."""
    sets = load_images(options.data)
    rows: list[dict[str, Any]] = []
    for images in sets:
        for seed in range(options.seeds):
            masks: dict[str, Mask] = {}
            for model in options.models if seed == 0 else options.models[:1]:
                rows += _mask_rows(model, images, options, seed, masks)
            if masks and options.steps:
                rows += _accuracy_rows(images, options, seed, masks)
            rows += _sigma_rows(images, options, seed)
    settings = {
        "models": options.models,
        "data": [images.name for images in sets],
        "seeds": list(range(options.seeds)),
        "samples": options.samples,
        "samples_of_other_models": min(8, options.samples),
        "shift": 1e-2,
        "mask_trained": f"{SPARSITY:.0%}",
        "steps": options.steps,
        "backpropagation": "Adam, rate 3e-3, cosine, batch 64",
        "sigmas": options.sigmas,
        "sigma_runs": f"stein, 8 devices, IID, k 8, batch 16, {options.rounds} rounds, 80 % pruned, rate 0.01",
    }
    report = Report.made(settings, rows, {})
    figures = {}
    for kind, key, scale in (("mask", "iou90", 1), ("mask", "iou90_real", 1), ("accuracy", "test_accuracy", 100)):
        for (data, model, what), value in _medians(report, kind, key).items():
            name = what.replace(", ", "_").replace(" ", "").replace(".", "")
            figures[f"{data}_{model}_{key}_{name}"] = scale * value
    for (data, _, what), value in _medians(report, "sigma", "test_accuracy").items():
        figures[f"{data}_sigma{what}_accuracy"] = 100 * value
    return Report.made(settings, rows, figures)


def _medians(report: Report, kind: str, key: str) -> dict[tuple[str, str, str], float]:
    """By data, model and what was varied, in order of the rows."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in report.rows:
        if row["kind"] == kind and row[key] is not None:
            found.setdefault((row["data"], row["model"], row["what"]), []).append(row[key])
    return {where: float(np.median(values)) for where, values in found.items()}


def draw(report: Report, figure: Figure) -> None:
    """Masks, accuracies and sigma, of the first data set."""
    data = report.settings["data"][0]
    masks, learnt, sigma = figure.subplots(1, 3, width_ratios=(1.5, 1.1, 1.0))
    shift = 0.0
    for colour, model in zip(COLOURS, report.settings["models"], strict=False):
        values = {what: v for (d, m, what), v in _medians(report, "mask", "iou90").items() if (d, m) == (data, model)}
        positions = [k + shift for k in range(len(values))]
        masks.barh(positions, list(values.values()), 0.4, color=colour, label=model)
        if not shift:
            masks.set_yticks([k + 0.2 for k in range(len(values))], list(values))
        shift += 0.4
    masks.invert_yaxis()
    masks.set_xlim(0, 1)
    masks.set_xlabel("overlap (IoU) with the mask of N(0, 1)")
    masks.set_title(f"masks at 90 %, {data}")
    figure.legend(*masks.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    reached = {what: 100 * v for (d, _, what), v in _medians(report, "accuracy", "test_accuracy").items() if d == data}
    learnt.barh(list(reached), list(reached.values()), color=COLOURS[0])
    for number, value in enumerate(reached.values()):
        learnt.text(value - 1, number, f"{value:.1f}", va="center", ha="right", color="white")
    learnt.invert_yaxis()
    learnt.set_xlabel("test accuracy, %")
    learnt.set_title("backpropagation under the mask")
    runs = {float(what): 100 * v for (d, _, what), v in _medians(report, "sigma", "test_accuracy").items() if d == data}
    sigma.plot(list(runs), list(runs.values()), "o-", color=COLOURS[0])
    sigma.set_xscale("log")
    sigma.set_ylim(bottom=0)
    sigma.set_xlabel("sigma")
    sigma.set_ylabel("test accuracy, %")
    sigma.set_title("zeroth-order runs")


def table(report: Report) -> Table:
    """One row a setting."""
    out = [["data", "model", "what", "IoU 90 % with N(0, 1)", "with real inputs", "test accuracy"]]
    real, reached = _medians(report, "mask", "iou90_real"), _medians(report, "accuracy", "test_accuracy")
    for where, value in _medians(report, "mask", "iou90").items():
        learnt = f"{reached[where]:.1%}" if where in reached else ""
        out.append([where[0], where[1], where[2], f"{value:.3f}", f"{real[where]:.3f}", learnt])
    for where, value in reached.items():
        if where[2] == RANDOM:
            out.append([where[0], where[1], "random mask", "", "", f"{value:.1%}"])
    for where, value in _medians(report, "sigma", "test_accuracy").items():
        out.append([where[0], where[1], f"zeroth-order run, sigma {where[2]}", "", "", f"{value:.1%}"])
    return out


EXPERIMENT = Experiment(
    "sensitivity to the distribution of the Gaussian inputs and to sigma",
    add_options,
    measure,
    draw,
    table,
    (11.0, 4.0),
)

"""How well forward passes find the exact saliency: LeNet-5 and ResNet-20 against automatic differentiation.

``python -m benchmarks.saliency [--json] [--seeds 5] [--models lenet5 resnet20]``

The estimate is what a device computes (:class:`UnitShiftScorer` on ONNX Runtime) and a server makes of it
(:func:`diagonal_scores`); the reference is the same score by one backward pass a sample and class in torch, in double
precision, on the same weights and the same Gaussian inputs. Spearman's rank correlation is over all maskable weights;
``iou90`` is the overlap (intersection over union) of the survivors at 90 % sparsity.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedzo.edge_runtime.estimation.saliency import UnitShiftScorer
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.ort import runtime_version
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.experiments.metrics import overlap, spearman
from fedzo.exporter.artifact import export_artifact
from fedzo.exporter.reference import exact_scores
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.pruning.mask import Mask, threshold
from fedzo.protocol.pruning.saliency import diagonal_scores, gaussian_inputs

from .report import Report

SHIFT = 1e-2
SPARSITY = 0.9


@dataclass(frozen=True)
class Setting:
    """What is scored: the input shape, the samples, and the whole-layer draws a layer."""

    input_shape: tuple[int, ...]
    samples: int
    draws: int


SETTINGS = {"lenet5": Setting((1, 32, 32), 64, 0), "resnet20": Setting((3, 32, 32), 8, 4)}


def score(model: str, setting: Setting, seed: int) -> list[dict[str, Any]]:
    """One row an estimator: with and without the whole-layer draws."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = export_artifact(model, setting.input_shape, 10, SPARSITY, seed, Path(folder) / model)
        weights = initial_weights(manifest.layout, seed)
        x = gaussian_inputs(manifest, seed, 0, 0, setting.samples)
        scorer = UnitShiftScorer(manifest, shift=SHIFT, draws=setting.draws, seed=seed)
        artifact, dense = load_artifact(Path(folder) / model), Mask.dense(manifest.layout)
        start = time.perf_counter()
        with Engine(artifact, dense, micro_batch=min(setting.samples, 32)) as engine:
            result = scorer.score(engine, weights, x, 0)
        forward_s = time.perf_counter() - start
    start = time.perf_counter()
    exact = exact_scores(model, manifest.layout, weights, x)
    backward_s = time.perf_counter() - start
    wanted = threshold(manifest.layout, exact.astype(np.float32), SPARSITY)
    maskable = manifest.layout.maskable()
    without_draws = result.passes - setting.draws * len(manifest.units)
    estimates = [(None, without_draws)] + ([(result.layer_totals, result.passes)] if setting.draws else [])
    rows = []
    for totals, passes in estimates:
        scores = diagonal_scores(manifest, weights, result.sensitivities, result.moments, totals)
        rows.append(
            {
                "model": model,
                "seed": seed,
                "samples": setting.samples,
                "draws": 0 if totals is None else setting.draws,
                "passes": passes,
                "spearman": spearman(scores[maskable], exact[maskable]),
                "iou90": overlap(threshold(manifest.layout, scores, SPARSITY), wanted),
                "forward_s": forward_s * passes / result.passes,
                "backward_s": backward_s,
            }
        )
    return rows


def measure(models: list[str], seeds: int) -> Report:
    """Score every model under every seed; the figures are those of the estimator with the most passes."""
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    for model in models:
        setting = SETTINGS[model]
        best = []
        for seed in range(seeds):
            found = score(model, setting, seed)
            rows += found
            best.append(found[-1])
        for name in ("spearman", "iou90"):
            values = [row[name] for row in best]
            figures[f"{model}_{name}"] = float(np.mean(values))
            figures[f"{model}_{name}_min"] = float(min(values))
        figures[f"{model}_passes"] = best[0]["passes"]
    settings = {"seeds": seeds, "shift": SHIFT, "sparsity": SPARSITY, "onnxruntime": runtime_version()}
    return Report(settings, rows, figures)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seeds", type=int, default=5, help="initial weights and inputs to try (default %(default)s)")
    parser.add_argument("--models", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="default: all")
    arguments = parser.parse_args()
    measure(arguments.models, arguments.seeds).write(as_json=arguments.json)


if __name__ == "__main__":
    main()

"""What the experiments share: artifacts in a folder of their own, scores, masks, differences of losses."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..edge_runtime.datasets.partition import partition_dirichlet, partition_iid
from ..edge_runtime.estimation.saliency import SaliencyResult, UnitShiftScorer
from ..edge_runtime.inference.engine import Engine
from ..edge_runtime.storage.artifact import Artifact, load_artifact
from ..exporter.artifact import export_artifact
from ..protocol.artifact.manifest import Manifest
from ..protocol.errors import ConfigError
from ..protocol.perturbation.directions import Directions, round_coefficients
from ..protocol.pruning.mask import Mask, threshold
from ..protocol.pruning.saliency import diagonal_scores, gaussian_inputs
from ..protocol.server_side.aggregation import average_blocks
from ..protocol.wire.messages import Report, ReportKind
from ..simulation.settings import parse_split

__all__ = [
    "DIGEST",
    "Scored",
    "check_splits",
    "combined",
    "dealt",
    "exported",
    "exported_folder",
    "gaussian_mask",
    "pooled_scores",
    "score_inputs",
]

DIGEST = bytes(16)
_TAG = bytes(4)

Scored = tuple[SaliencyResult, int]
"""What a device measured, and on how many samples."""


def check_splits(splits: Sequence[str]) -> None:
    """Raise ConfigError unless every split is ``iid`` or ``dirichlet:ALPHA``."""
    for split in splits:
        if parse_split(split)[0] not in ("iid", "dirichlet"):
            raise ConfigError(f"the split is {split!r}", hint="use iid or dirichlet:0.1 (any number above 0)")


def dealt(split: str, labels: NDArray[np.int64], devices: int, seed: int) -> list[NDArray[np.int64]]:
    """Rows of every device, ``int64[n]`` each, as the simulation deals them."""
    kind, alpha = parse_split(split)
    if kind == "dirichlet":
        return partition_dirichlet(labels, devices, alpha, seed)
    return partition_iid(len(labels), devices, seed)


@contextmanager
def exported_folder(
    model: str, input_shape: tuple[int, ...], n_classes: int, seed: int, *, sparsity: float = 0.9
) -> Iterator[Path]:
    """A temporary folder that holds an artifact."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "artifact"
        export_artifact(model, input_shape, n_classes, sparsity, seed, path)
        yield path


@contextmanager
def exported(
    model: str, input_shape: tuple[int, ...], n_classes: int, seed: int, *, sparsity: float = 0.9
) -> Iterator[Artifact]:
    """An artifact in a temporary folder."""
    with exported_folder(model, input_shape, n_classes, seed, sparsity=sparsity) as folder:
        yield load_artifact(folder)


def score_inputs(engine: Engine, weights: NDArray[np.float32], x: NDArray[np.float32], shift: float = 1e-2) -> Scored:
    """Score dense weights on inputs, as a device does."""
    scorer = UnitShiftScorer(engine.artifact.manifest, shift=shift)
    return scorer.score(engine, weights, np.ascontiguousarray(x), 0), len(x)


def pooled_scores(manifest: Manifest, weights: NDArray[np.float32], scored: Sequence[Scored]) -> NDArray[np.float32]:
    """One score a weight from what several devices measured, as the server makes it."""
    reports = [
        Report(ReportKind.SALIENCY, _TAG, 0, 1, samples, DIGEST, 0.0, result.passes, 0, 0, result.blocks)
        for result, samples in scored
    ]
    sensitivities, moments = (block.astype(np.float32) for block in average_blocks(reports))
    return diagonal_scores(manifest, weights, sensitivities, moments)


def gaussian_mask(
    artifact: Artifact, weights: NDArray[np.float32], sparsity: float, seed: int, samples: int = 64
) -> Mask:
    """The mask of a data-free run with one scoring round."""
    manifest = artifact.manifest
    if sparsity == 0.0:
        return Mask.dense(manifest.layout)
    with Engine(artifact, Mask.dense(manifest.layout), micro_batch=32) as engine:
        scored = score_inputs(engine, weights, gaussian_inputs(manifest, seed, 0, 0, samples))
    return threshold(manifest.layout, pooled_scores(manifest, weights, [scored]), sparsity)


def combined(
    directions: Directions, round_: int, positions: NDArray[np.int64], scalars: NDArray[np.float32]
) -> NDArray[np.float32]:
    """``mean_k scalars[k] * direction(positions[k])`` as every side of a run computes it."""
    return directions.combine(round_, positions, round_coefficients(scalars.astype(np.float64) / len(scalars)))

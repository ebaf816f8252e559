"""SynFlow's masks by forward passes: Tanaka et al., NeurIPS 2020 (arXiv 2006.05467).

With the absolute values of all weights and an input of ones, ``R`` is the sum of the logits, and the score of a weight
is ``theta dR/dtheta``. Everything is positive then, so a ReLU does nothing and ``R`` is linear in the shift of a unit's
pre-activations: one pass a unit gives ``dR/dz`` whatever the size of the shift. Times the unit's inputs this is the
derivative; where inputs differ from place to place (at padded borders), a mean stands for them. Layer totals need no
such mean: ``R`` is also linear in the weights of one layer, so doubling them gives the layer's total.

A network with a normalisation is not linear like that; :func:`synflow_mask` says so instead of giving a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..edge_runtime.inference.engine import Engine
from ..edge_runtime.storage.artifact import Artifact
from ..protocol.artifact.layout import initial_weights
from ..protocol.errors import ConfigError
from ..protocol.pruning.mask import Mask, threshold
from ..protocol.settings import RunSettings

__all__ = ["check_synflow", "path_scores", "synflow_mask"]

SHIFT = np.float32(2.0**16)
"""Any shift gives the same derivative but for rounding, which a large one hides."""

TOLERANCE = 1e-3
"""By how much a layer may miss linearity, relative to the logits."""


def check_synflow(artifact: Artifact, settings: RunSettings) -> None:
    """Whether a run that wants such a mask can have it, before it begins: some passes of one sample.

    Args:
        artifact: Opened here if the settings ask for ``synflow``.
        settings: Of the run.

    Raises:
        ConfigError: See :func:`synflow_mask`.
    """
    if settings.sparsity == 0.0 or settings.saliency.method != "synflow":
        return
    manifest = artifact.manifest
    weights = np.abs(initial_weights(manifest.layout, manifest.seed))
    dense = Mask.dense(manifest.layout)
    with Engine(artifact, dense, threads=1, micro_batch=1, layout="portable", queries=1) as engine:
        _layer_totals(engine, weights, np.ones((1, *manifest.input_shape), np.float32))


def synflow_mask(
    artifact: Artifact, settings: RunSettings, *, threads: int = 1, cancelled: Callable[[], bool] = lambda: False
) -> Mask:
    """Prune step by step, and score the survivors again after each.

    Args:
        artifact: Opened here, one engine a step.
        settings: Sparsity, floor and the number of steps.
        threads: Threads within an operator.
        cancelled: Asked before each step; then the mask so far is returned.

    Raises:
        ConfigError: The network is not linear for positive inputs and weights, or overflows float32.
    """
    manifest, saliency = artifact.manifest, settings.saliency
    weights = np.abs(initial_weights(manifest.layout, manifest.seed))
    mask = Mask.dense(manifest.layout)
    for step in range(1, saliency.n_steps + 1):
        if cancelled():
            break
        with Engine(artifact, mask, threads=threads, micro_batch=1, layout="portable", queries=1) as engine:
            scores = path_scores(engine, weights[mask.kept])
        sparsity = saliency.sparsity_after(step, settings.sparsity)
        mask = threshold(manifest.layout, scores, sparsity, within=mask, floor=saliency.floor)
    return mask


def path_scores(engine: Engine, weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """``theta dR/dtheta`` of every weight of the unit layers, relative to the largest layer total.

    Args:
        engine: Of the mask whose survivors are scored; its ``weights_feed`` is overwritten.
        weights: ``float32[n_survivors]``, not negative.

    Returns:
        ``float32[layout.size]``, owned by the caller; 0 for removed weights and outside the unit layers.

    Raises:
        ConfigError: See :func:`synflow_mask`.
    """
    manifest = engine.artifact.manifest
    ones = np.ones((1, *manifest.input_shape), np.float32)
    inputs = np.sqrt(engine.moments(weights, ones).astype(np.float64))
    totals = _layer_totals(engine, weights, ones)
    shift = np.zeros(manifest.n_units, np.float32)
    clean = _sum(engine.shifted_logits(weights, ones, shift))
    slopes = np.ones(manifest.n_units, np.float64)
    for unit in manifest.units:
        if unit.is_output:
            continue
        for number in range(unit.shift_offset, unit.shift_offset + unit.n_units):
            shift[number] = SHIFT
            slopes[number] = (_sum(engine.shifted_logits(engine.weights_feed, ones, shift)) - clean) / float(SHIFT)
            shift[number] = 0.0
    dense = np.zeros(manifest.layout.size, np.float64)
    dense[engine.mask.kept] = weights
    largest = max(totals)
    scores = np.zeros(manifest.layout.size, np.float32)
    for unit, total in zip(manifest.units, totals, strict=True):
        part = manifest.layout.slice_of(manifest.layout.position_of(unit.parameter))
        layer = dense[part].reshape(unit.groups, unit.n_units // unit.groups, -1)
        slope = np.maximum(slopes[unit.shift_offset : unit.shift_offset + unit.n_units], 0.0)
        layer = layer * slope.reshape(unit.groups, -1, 1)
        layer *= inputs[unit.moment_offset : unit.moment_offset + unit.n_moments].reshape(unit.groups, 1, -1)
        found = math.fsum(layer.ravel().tolist())
        if found > 0.0:
            layer *= total / largest / found
        scores[part] = layer.ravel()
    return scores


def _layer_totals(engine: Engine, weights: NDArray[np.float32], ones: NDArray[np.float32]) -> list[float]:
    """What each layer adds to ``R`` when its weights are doubled: the sum of its scores."""
    manifest = engine.artifact.manifest
    counts = engine.mask.counts()
    starts = np.concatenate([[0], np.cumsum(counts)])

    def scaled(position: int, factor: float) -> float:
        moved = weights.copy()
        moved[starts[position] : starts[position + 1]] *= np.float32(factor)
        return _sum(engine.logits(moved, ones))

    whole = _sum(engine.logits(weights, ones))
    totals = []
    for unit in manifest.units:
        position = manifest.layout.position_of(unit.parameter)
        once, thrice = scaled(position, 2.0) - whole, (scaled(position, 4.0) - whole) / 3.0
        if not (once > TOLERANCE * whole > 0.0 and abs(once - thrice) <= TOLERANCE * whole):
            raise ConfigError(
                f"synflow is not defined for {manifest.model}: its logits are not linear in {unit.parameter}",
                hint="it needs a chain of layers and ReLUs without normalisation; use --pruning diagonal",
            )
        totals.append(once)
    return totals


def _sum(logits: NDArray[np.float32]) -> float:
    total = math.fsum(logits.ravel().tolist()) if np.isfinite(logits).all() else math.inf
    if not math.isfinite(total):
        raise ConfigError("synflow overflows float32: the network is too deep for it", hint="use --pruning diagonal")
    return total

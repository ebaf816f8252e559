"""Scores of the channels of a network before it has seen data: forward passes on Gaussian inputs, or its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..protocol.artifact.layout import initial_weights
from ..protocol.artifact.manifest import Manifest
from ..protocol.artifact.structure import ChannelScores
from ..protocol.errors import ConfigError
from ..protocol.perturbation.streams import Purpose, uint16s
from ..protocol.pruning.saliency import diagonal_scores, gaussian_inputs
from .sessions import dense_feeds, open_graph

__all__ = ["SCORING_SAMPLES", "channel_scores", "parameter_gains"]

SCORING_SAMPLES: Final = 16
SHIFT: Final = np.float32(1e-2)


def channel_scores(
    scores: ChannelScores, manifest: Manifest, files: Mapping[str, bytes]
) -> dict[str, NDArray[np.float64]] | None:
    """A score of every unit of every unit layer, at the network's initial weights.

    ``diagonal``: the sum of :func:`~fedzo.protocol.pruning.saliency.diagonal_scores` over the unit's weights, what a
    device would measure on Gaussian inputs. ``magnitude``: the sum of their absolute values. ``random``: uniform
    numbers of the manifest's seed. ``uniform``: None, as no unit is better than another.

    Args:
        scores: Which.
        manifest: Of the whole network.
        files: Its graphs.

    Raises:
        ConfigError: A score is not finite.
    """
    if scores == "uniform":
        return None
    layout, units = manifest.layout, manifest.units
    weights = initial_weights(layout, manifest.seed)
    if scores == "random":
        draws = uint16s(manifest.seed, Purpose.SALIENCY_DRAW, 0, 0, manifest.n_units).astype(np.float64)
        return {u.parameter: draws[u.shift_offset : u.shift_offset + u.n_units] for u in units}
    if scores == "magnitude":
        values = np.abs(weights)
    else:
        x = gaussian_inputs(manifest, manifest.seed, 0, 0, SCORING_SAMPLES)
        moments = open_graph(files["moments.onnx"])({**dense_feeds(layout, weights), "x": x})["moments"]
        values = diagonal_scores(manifest, weights, _sensitivities(manifest, files, weights, x), moments)
    rows = {u.parameter: values[layout.slice_of(layout.position_of(u.parameter))] for u in units}
    return {u.parameter: rows[u.parameter].reshape(u.n_units, -1).sum(axis=1, dtype=np.float64) for u in units}


def parameter_gains(manifest: Manifest, files: Mapping[str, bytes]) -> NDArray[np.float64]:
    """Squared gradients of the logits with respect to each parameter: ``float64[n_parameters]``.

    Summed over its entries and the logits, mean over Gaussian inputs, at the initial weights: the diagonal score
    without the weights themselves. Exact behind a fully connected layer; what shares weights over positions is taken to
    move everywhere at once. 0 for what is no weight of a unit layer.

    Args:
        manifest: Of a network.
        files: Its graphs.

    Raises:
        ConfigError: The network has no unit layer, or a number is not finite.
    """
    layout = manifest.layout
    if not manifest.units:
        raise ConfigError("no layer of the model can be scored", hint="export it without --sections")
    weights, x = initial_weights(layout, manifest.seed), gaussian_inputs(manifest, manifest.seed, 0, 0, SCORING_SAMPLES)
    moments = open_graph(files["moments.onnx"])({**dense_feeds(layout, weights), "x": x})["moments"]
    ones = np.ones(layout.size, np.float32)
    values = diagonal_scores(manifest, ones, _sensitivities(manifest, files, weights, x), moments, shift=None)
    gains = np.zeros(len(layout.parameters), np.float64)
    for unit in manifest.units:
        position = layout.position_of(unit.parameter)
        gains[position] = values[layout.slice_of(position)].sum(dtype=np.float64)
    return gains


def _sensitivities(
    manifest: Manifest, files: Mapping[str, bytes], weights: NDArray[np.float32], x: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Mean squared change of the logits per squared shift of each unit: ``float32[n_units]``."""
    run, shift = open_graph(files["saliency.onnx"]), np.zeros(manifest.n_units, np.float32)
    feeds = {**dense_feeds(manifest.layout, weights), "x": x, "shift": shift}
    clean = run(feeds)["logits"].astype(np.float64)
    out = np.ones(manifest.n_units, np.float64)
    for unit in manifest.units:
        for number in range(unit.shift_offset, unit.shift_offset + (0 if unit.is_output else unit.n_units)):
            shift[number] = SHIFT
            out[number] = float(np.square(run(feeds)["logits"] - clean).sum()) / (len(x) * float(SHIFT) ** 2)
            shift[number] = 0.0
    if not np.isfinite(out).all():
        raise ConfigError("a channel's score is not finite: the initial weights overflow float32")
    return out.astype(np.float32)

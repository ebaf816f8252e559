"""Which scores the server computes again, and how much a board's may differ from the server's own.

On Gaussian inputs a device's scores follow from the weights, the seed and the device's number, so the server can
compute them too. A board whose numerics are off is found before it trains; its scores do not count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import Manifest
from ..perturbation.streams import Purpose, uint64s
from ..settings import RunSettings

__all__ = ["checked_ranks", "largest_difference"]


def checked_ranks(settings: RunSettings, round_: int, n_participants: int) -> frozenset[int]:
    """Places among the participants of a scoring round whose reports are checked; drawn when there are too many."""
    saliency = settings.saliency
    if saliency.inputs != "gaussian" or not saliency.is_federated:
        return frozenset()
    words = uint64s(settings.seed, Purpose.SCORE_CHECK, round_, 0, n_participants)
    return frozenset(np.argsort(words, kind="stable")[: saliency.checked].tolist())


def largest_difference(
    manifest: Manifest, expected: Sequence[NDArray[np.float32]], reported: Sequence[NDArray[np.float32]]
) -> float:
    """Largest relative difference of a layer's sensitivities, moments or total.

    Each is a Euclidean norm over one layer, so that one wrong layer shows however small it is beside the others.

    Args:
        manifest: Gives the layers.
        expected: What the server computed: ``float32[n_units]``, ``float32[n_moments]`` and perhaps
            ``float32[n_layers]``.
        reported: What the device sent, of the same shapes.

    Returns:
        Infinity where the device reports something and there is nothing.
    """
    pairs: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    for number, unit in enumerate(manifest.units):
        parts = [
            slice(unit.shift_offset, unit.shift_offset + unit.n_units),
            slice(unit.moment_offset, unit.moment_offset + unit.n_moments),
            slice(number, number + 1),
        ]
        pairs += [(a[part], b[part]) for a, b, part in zip(expected, reported, parts[: len(expected)], strict=True)]
    return max((_relative(a.astype(np.float64), b.astype(np.float64)) for a, b in pairs), default=0.0)


def _relative(expected: NDArray[np.float64], reported: NDArray[np.float64]) -> float:
    difference, scale = float(np.linalg.norm(reported - expected)), float(np.linalg.norm(expected))
    if difference == 0.0:
        return 0.0
    return difference / scale if scale > 0.0 else float("inf")

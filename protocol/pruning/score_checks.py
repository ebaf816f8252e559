"""Which scores the server computes again, and how much a board's may differ from the server's own.

On Gaussian inputs a device's scores follow from the weights, the seed and the device's number, so the server can
compute them too. A board whose numerics are off is found before it trains; its scores do not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import Manifest
from ..perturbation.streams import Purpose, uint64s
from ..settings import RunSettings

__all__ = ["checked_ranks", "largest_difference"]

_ABOVE_NOISE = 200.0
"""A difference as large as the noise level is 0.005 of this: the limit."""


def checked_ranks(settings: RunSettings, round_: int, n_participants: int) -> frozenset[int]:
    """Places among the participants of a scoring round whose reports are checked; drawn when there are too many."""
    saliency = settings.saliency
    if saliency.inputs != "gaussian" or not saliency.is_federated:
        return frozenset()
    words = uint64s(settings.seed, Purpose.SCORE_CHECK, round_, 0, n_participants)
    return frozenset(np.argsort(words, kind="stable")[: saliency.checked].tolist())


def largest_difference(
    manifest: Manifest,
    expected: Sequence[NDArray[np.float32]],
    reported: Sequence[NDArray[np.float32]],
    *,
    noise: float = 0.0,
) -> float:
    """Largest relative difference of a layer's sensitivities, moments or total.

    Each is a Euclidean norm over one layer, so that one wrong layer shows however small it is beside the others. What
    is not far above the noise is compared with that instead: no two machines agree on it.

    Args:
        manifest: Gives the layers.
        expected: What the server computed: ``float32[n_units]``, ``float32[n_moments]`` and perhaps
            ``float32[n_layers]``.
        reported: What the device sent, of the same shapes.
        noise: Of a sensitivity and of a layer's total, ``level`` of :class:`~.blind_layers.Visibility`.

    Returns:
        Infinity where the device reports something and there is nothing.
    """
    worst = 0.0
    for number, unit in enumerate(manifest.units):
        parts = [
            slice(unit.shift_offset, unit.shift_offset + unit.n_units),
            slice(unit.moment_offset, unit.moment_offset + unit.n_moments),
            slice(number, number + 1),
        ][: len(expected)]
        for a, b, part, level in zip(expected, reported, parts, (noise, 0.0, noise), strict=False):
            least = _ABOVE_NOISE * level * math.sqrt(part.stop - part.start)
            worst = max(worst, _relative(a[part].astype(np.float64), b[part].astype(np.float64), least))
    return worst


def _relative(expected: NDArray[np.float64], reported: NDArray[np.float64], least: float) -> float:
    difference, scale = float(np.linalg.norm(reported - expected)), max(float(np.linalg.norm(expected)), least)
    if difference == 0.0:
        return 0.0
    return difference / scale if scale > 0.0 else float("inf")

"""How alike two scores, two masks or two gradients are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..protocol.pruning.mask import Mask

__all__ = ["cosine_squared", "overlap", "relative_error", "slope", "spearman"]


def relative_error(estimate: NDArray[Any], reference: NDArray[Any]) -> float:
    """``|estimate - reference| / |reference|`` in the Euclidean norm."""
    wanted = reference.astype(np.float64)
    return float(np.linalg.norm(estimate.astype(np.float64) - wanted) / np.linalg.norm(wanted))


def cosine_squared(estimate: NDArray[Any], reference: NDArray[Any]) -> float:
    """Squared cosine of the angle: the part of the reference's energy that lies along the estimate."""
    a, b = estimate.astype(np.float64), reference.astype(np.float64)
    below = float(a @ a) * float(b @ b)
    return float(a @ b) ** 2 / below if below else 0.0


def overlap(a: Mask, b: Mask) -> float:
    """Intersection over union of the maskable survivors."""
    maskable = a.layout.maskable()
    return float((a.kept & b.kept & maskable).sum() / ((a.kept | b.kept) & maskable).sum())


def spearman(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Spearman's rank correlation, ties at their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - 0.5 * (counts - 1))[inverse], np.float64)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent ``a`` of ``y ~ x**a``, by least squares over the logarithms."""
    a = np.array([math.log(value) for value in x])
    b = np.array([math.log(value) for value in y])
    a -= a.mean()
    return float(a @ (b - b.mean()) / (a @ a))

"""Losses of batches: their mean, or the news that the weights have diverged, and what logits are worth."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ...protocol.errors import ConfigError

__all__ = ["NonFiniteLossError", "mean_loss", "scored"]


class NonFiniteLossError(ConfigError):
    """A loss is infinite or NaN: the run's learning rate or sigma lets the weights diverge.

    A class of its own because a device answers it with ``Decline.NON_FINITE`` and stays in the run.
    """


def mean_loss(loss_sum: float, n_samples: int) -> float:
    """Mean over a batch.

    Raises:
        NonFiniteLossError: It is infinite or NaN.
    """
    mean = loss_sum / n_samples
    if not math.isfinite(mean):
        raise NonFiniteLossError(
            f"the loss of a batch of {n_samples} samples is {mean}: the weights have diverged",
            hint="use a smaller learning_rate or sigma",
        )
    return mean


def scored(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[float, int]:
    """Sum of the cross-entropies, and number of rows whose largest logit is the label's.

    Args:
        logits: ``float32[n, n_classes]``.
        labels: ``int64[n]``.
    """
    rows = logits.astype(np.float64)
    correct = int(np.count_nonzero(rows.argmax(axis=1) == labels))
    with np.errstate(invalid="ignore", over="ignore"):
        rows -= rows.max(axis=1, keepdims=True)
        losses = np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(labels)), labels]
    return float(losses.sum()), correct

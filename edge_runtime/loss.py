"""From the sum of a batch's losses to their mean, or to the news that the weights have diverged."""

from __future__ import annotations

import math

from ..protocol.errors import ConfigError

__all__ = ["NonFiniteLossError", "mean_loss"]


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

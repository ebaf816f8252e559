"""Learning rates by queries: a short run whose rate grows from round to round, read off the losses that devices report.

A range test (Smith, "Cyclical learning rates for training neural networks", WACV 2017, section 3.3) is a run of its own
with the schedule ``range``; the run that follows starts from the initial weights with the rate that was found. Devices
know no difference: they follow from one run document to the next.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final

from ..errors import ConfigError
from ..settings import RunSettings

__all__ = ["RangeTest", "range_test_settings", "with_found_rate"]

SMOOTHING: Final = 0.8
"""Decay of the average over the losses of the rounds."""

RISE: Final = 1.5
"""The test is over when the smoothed loss is this many times its best."""

LEAST_UPDATES: Final = 8
LEAST_FALL: Final = 0.05
LOWEST, HIGHEST = 1e-5, 10.0
"""Rates of the first and the last update."""


class RangeTest:
    """What the losses say about the rates tried so far.

    Attributes:
        rates: Rate of every update.
        losses: Smoothed mean loss after it, as far as a later round has measured it.
    """

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._sum = self._weight = 0.0

    def add(self, rate: float, loss: float) -> None:
        """Take a round.

        Args:
            rate: Of the update that it made.
            loss: Mean loss that its devices reported: at the weights before that update.
        """
        self._sum = SMOOTHING * self._sum + (1.0 - SMOOTHING) * loss
        self._weight = SMOOTHING * self._weight + (1.0 - SMOOTHING)
        self.rates.append(rate)
        self.losses.append(self._sum / self._weight)

    def state(self) -> dict[str, Any]:
        """What a snapshot says of it, as JSON types."""
        return {"rates": self.rates, "losses": self.losses, "sum": self._sum, "weight": self._weight}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to the state of :meth:`state`.

        Raises:
            KeyError, TypeError, ValueError: It is nothing of the kind.
        """
        self.rates, self.losses = [float(rate) for rate in state["rates"]], [float(loss) for loss in state["losses"]]
        self._sum, self._weight = float(state["sum"]), float(state["weight"])

    @property
    def is_over(self) -> bool:
        """Whether the loss has risen so much that higher rates need not be tried."""
        return len(self.losses) > LEAST_UPDATES and self.losses[-1] > RISE * min(self.losses)

    def rate(self) -> float:
        """The rate to train with: the first one at which the smoothed loss has made half of its whole fall.

        It lies in the middle of the steepest descent, where a slope between neighbours is mostly noise. The rate of the
        lowest loss is no choice: a rate that lasts for the whole run diverges long before one that lasts for a round.

        Raises:
            ConfigError: The loss never fell.
        """
        best = min(range(len(self.losses)), key=self.losses.__getitem__, default=0)
        start = math.fsum(self.losses[:LEAST_UPDATES]) / LEAST_UPDATES
        if best < LEAST_UPDATES or not self.losses[best] < (1.0 - LEAST_FALL) * start:
            raise ConfigError(
                f"after {len(self.losses)} updates of the range test no rate has made the loss fall",
                hint="give --learning-rate a number, or the test a larger --tune-rounds, --k or --batch",
            )
        half = 0.5 * (start + self.losses[best])
        return next(rate for rate, loss in zip(self.rates, self.losses, strict=True) if loss <= half)


def range_test_settings(settings: RunSettings) -> RunSettings:
    """The range test in front of a run; it evaluates nothing, keeps no average and counts no late reports."""
    training = dataclasses.replace(
        settings.training,
        rounds=settings.tune_rounds,
        optimiser=dataclasses.replace(settings.training.optimiser, ema=0.0),
        schedule="range",
        learning_rate=HIGHEST,
        final_rate=LOWEST / HIGHEST,
        warmup=0,
        k_max=0,
    )
    return dataclasses.replace(settings, training=training, evaluate_every=0, tune_rounds=0, staleness=0)


def with_found_rate(settings: RunSettings, test: RangeTest) -> RunSettings:
    """The run itself.

    Args:
        settings: Of the run, as they were before the test.
        test: What it found.

    Raises:
        ConfigError: It found no rate.
    """
    training = dataclasses.replace(settings.training, learning_rate=test.rate())
    return dataclasses.replace(settings, training=training, tune_rounds=0)

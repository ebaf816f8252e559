"""Differences of losses along seeded directions: weights, a batch and positions in, scalars out.

The server half is :func:`fedzo.protocol.replay.update.estimate_gradient`: it never sees losses or data, only scalars,
and every side rebuilds the directions from the seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...protocol.errors import ConfigError, FedzoError
from ...protocol.perturbation.buffers import aligned_zeros
from ..datasets.data import Batch
from ..inference.engine import Engine, NonFiniteLossError
from ..inference.loss_source import LossSource, WholeLosses

__all__ = ["Basis", "Cancelled", "Scalars", "SteinEstimator", "never"]


class Cancelled(FedzoError):  # noqa: N818 - it reports no error but that nobody wants the result any more
    """A probe was given up between two queries, because its round is over."""


def never() -> bool:
    """The ``cancelled`` of a caller that always wants the result."""
    return False


class Basis(Protocol):
    """Numbered directions of some weights: seeded ones, or the axes."""

    @property
    def size(self) -> int:
        """Weights that a direction moves."""
        ...

    def scaled(self, round_: int, position: int, scale: np.float32, out: NDArray[np.float32]) -> NDArray[np.float32]:
        """Write ``scale`` times one direction into ``out float32[size]``."""
        ...

    def combine(
        self, round_: int, positions: NDArray[np.int64], coefficients: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Sum of coefficient times direction: ``float32[size]``, owned by the caller."""
        ...


@dataclass(frozen=True, eq=False)
class Scalars:
    """What one probe measured.

    Attributes:
        values: ``float32[n]``, one directional derivative a position, finite; owned by the caller.
        mean_loss: Mean loss at the weights themselves; for two-sided differences the mean over both sides, which
            differs by O(sigma**2).
        queries: Losses evaluated.
    """

    values: NDArray[np.float32]
    mean_loss: float
    queries: int


class SteinEstimator:
    """Directional derivatives by differences of losses (Stein's identity for Gaussian smoothing).

    One-sided: ``(L(w + sigma d) - L(w)) / sigma`` with one clean loss shared by all positions, ``n + 1`` queries.
    Two-sided: ``(L(w + sigma d) - L(w - sigma d)) / (2 sigma)``, both sides with one direction, ``2 n`` queries.

    Losses and differences are float64. At ``sigma <= 1e-4`` the float32 arithmetic of the forward pass dominates a
    one-sided scalar. Sources: Feng et al. (BAFFLE), arXiv 2301.12195, Eq. 4; Spall, IEEE TAC 37 (1992), for two sides.

    Args:
        directions: They move as many weights, from the first one on; the others stay as they are.
        sigma: Length scale, a positive float32 value.
        two_sided: Central instead of forward differences.

    Raises:
        ConfigError: ``sigma`` is not a positive, finite float32 value.
    """

    def __init__(self, directions: Basis, sigma: float, two_sided: bool = False) -> None:
        self._sigma = np.float32(sigma)
        if not (np.isfinite(self._sigma) and self._sigma > 0 and float(self._sigma) == sigma):
            raise ConfigError(f"sigma is {sigma!r}, it must be a positive float32 value such as {2.0**-10}")
        self._directions = directions
        self._two_sided = two_sided
        self._step = aligned_zeros(directions.size)  # sigma times the direction

    def queries(self, n_positions: int) -> int:
        """Losses that a probe of so many positions evaluates."""
        return 2 * n_positions if self._two_sided else n_positions + 1

    def probe(
        self,
        engine: Engine,
        weights: NDArray[np.float32],
        batch: Batch,
        round_: int,
        positions: NDArray[np.int64],
        cancelled: Callable[[], bool] = never,
    ) -> Scalars:
        """:meth:`measure` with whole passes; the engine's ``weights_feed`` is overwritten."""
        return self.measure(WholeLosses(engine, batch), weights, round_, positions, cancelled)

    def measure(
        self,
        source: LossSource,
        weights: NDArray[np.float32],
        round_: int,
        positions: NDArray[np.int64],
        cancelled: Callable[[], bool] = never,
        sigma: float = 0.0,
    ) -> Scalars:
        """Measure one scalar a position.

        Deterministic: the same arguments give the same bits on the same machine and ONNX Runtime.

        Args:
            source: Evaluates the losses.
            weights: ``float32[n]``, all that the source takes, read only.
            round_: Round of the directions.
            positions: ``int64[k]``, positions of the round's directions.
            cancelled: Asked before each query, or before each run of several.
            sigma: Length scale of this probe, a float32 value; 0 for the estimator's own.

        Raises:
            Cancelled: ``cancelled`` returned true.
            NonFiniteLossError: A loss, or a scalar as float32, is not finite.
            MemoryBudgetError: The tensors do not fit under the engine's limit.
        """
        scale, two_sided = np.float32(sigma) if sigma else self._sigma, self._two_sided
        losses = self._losses(source, weights, round_, positions.tolist(), scale, cancelled)
        sigma = float(scale)
        if two_sided:
            plus, minus = losses[0::2], losses[1::2]
            values = (plus - minus) / (2.0 * sigma)
        else:
            values = (losses[1:] - losses[0]) / sigma
        if not np.all(np.abs(values) <= float(np.finfo(np.float32).max)):
            raise NonFiniteLossError(
                f"a directional derivative of round {round_} is larger than float32 holds",
                hint="use a larger sigma or a smaller learning_rate",
            )
        mean_loss = float(losses.sum()) / max(1, len(losses)) if two_sided else float(losses[0])
        return Scalars(values.astype(np.float32), mean_loss, len(losses))

    def _losses(
        self,
        source: LossSource,
        weights: NDArray[np.float32],
        round_: int,
        positions: list[int],
        sigma: np.float32,
        cancelled: Callable[[], bool],
    ) -> NDArray[np.float64]:
        """All losses in order: the clean one and one a position, or two a position. ``float64[queries]``."""
        feeds, size = source.feeds(), self._directions.size
        feeds[:, size:] = weights[size:]
        moved = weights[:size]
        losses = np.empty(self.queries(len(positions)), np.float64)
        for start in range(0, len(losses), len(feeds)):
            if cancelled():
                raise Cancelled(f"the probe of round {round_} was cancelled")
            rows = feeds[: len(losses) - start]
            for query, feed in enumerate(rows[:, :size], start):
                if self._two_sided:
                    if query % 2 == 0:
                        self._directions.scaled(round_, positions[query // 2], sigma, self._step)
                    (np.subtract if query % 2 else np.add)(moved, self._step, out=feed)
                elif query == 0:
                    np.copyto(feed, moved)
                else:
                    self._directions.scaled(round_, positions[query - 1], sigma, feed)
                    np.add(moved, feed, out=feed)
            losses[start : start + len(rows)] = source.losses(rows)
        return losses

"""Where an estimator gets losses from: whole passes, or passes from stored features."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..datasets.data import Batch
from .engine import Engine
from .suffix import Suffix

__all__ = ["LossSource", "SuffixLosses", "WholeLosses"]


class LossSource(Protocol):
    """Losses of one batch at any weights, one run of a graph at a time."""

    def feeds(self) -> NDArray[np.float32]:
        """Room for the weights of one run, ``float32[queries, n]``, written by the caller; it stays the source's."""
        ...

    def losses(self, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """Mean losses at the first rows of :meth:`feeds`: ``float64[len(rows)]``.

        Raises:
            NonFiniteLossError: The weights have diverged.
            MemoryBudgetError: The tensors do not fit under the engine's limit.
        """
        ...


class WholeLosses:
    """Losses of all survivors.

    Args:
        engine: Evaluates them, several at a time where that is quicker.
        batch: The samples.
    """

    def __init__(self, engine: Engine, batch: Batch) -> None:
        self._engine, self._batch = engine, batch

    def feeds(self) -> NDArray[np.float32]:
        """See :meth:`LossSource.feeds`; ``n`` is the number of survivors."""
        return self._engine.query_batches.feeds(self._batch.x, self._batch.y)

    def losses(self, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """See :meth:`LossSource.losses`."""
        return self._engine.losses(rows, self._batch.x, self._batch.y)


class SuffixLosses:
    """Losses of the survivors behind the cut, from stored features.

    Args:
        suffix: Of one batch.
    """

    def __init__(self, suffix: Suffix) -> None:
        self._suffix = suffix

    def feeds(self) -> NDArray[np.float32]:
        """See :meth:`LossSource.feeds`; ``n`` is the number of survivors behind the cut."""
        return self._suffix.weights_feed[np.newaxis]

    def losses(self, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """See :meth:`LossSource.losses`."""
        assert len(rows) == 1, "feeds() has one row"
        return np.array([self._suffix.loss(self._suffix.weights_feed)])

"""The exponential moving average of the weights over the updates, the same bits on every side.

After update ``t`` the average is ``a = d a + (1 - d) w``, from ``a = 0``, and what is evaluated is ``a / (1 - d**t)``:
a weighted mean of the weights after each update in which the initial weights have no part. The bias of the start is
removed as in Adam's moments (Kingma and Ba, ICLR 2015, section 3). Source of averages: Polyak and Juditsky,
"Acceleration of stochastic approximation by averaging", SIAM J. Control Optim. 30 (1992).

Only elementwise float32 numpy calls, one an operation; entries below ``2**-100`` become zero, see ``optimisers.py``.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["MovingAverage"]

_SMALLEST: Final = np.float32(2.0**-100)


class MovingAverage:
    """The average of some weights.

    Args:
        decay: ``0 < decay < 1``; the mean reaches back about ``1 / (1 - decay)`` updates.
        size: Number of weights.

    Attributes:
        sums: ``float32[size]``, the average before its bias is removed; written in place.
    """

    def __init__(self, decay: float, size: int) -> None:
        self._decay: Final = np.float32(decay)
        self.sums: Final[NDArray[np.float32]] = np.zeros(size, dtype=np.float32)
        self._power = 1.0

    def restore(self, steps: int, sums: NDArray[np.float32] | None = None) -> None:
        """Go to the average after so many updates; ``sums`` is copied, and zeros if there is none."""
        np.copyto(self.sums, np.float32(0.0) if sums is None else sums)
        self._power = 1.0
        for _ in range(steps):  # Products, as in :meth:`add`: ``pow`` differs between machines.
            self._power *= float(self._decay)

    def add(self, weights: NDArray[np.float32]) -> None:
        """Take the weights after an update, ``float32[size]`` and finite."""
        np.multiply(self.sums, self._decay, out=self.sums)
        np.add(self.sums, np.multiply(weights, np.subtract(np.float32(1.0), self._decay)), out=self.sums)
        np.copyto(self.sums, np.float32(0.0), where=np.less(np.absolute(self.sums), _SMALLEST))
        self._power *= float(self._decay)

    def values(self) -> NDArray[np.float32]:
        """The average of at least one update: ``float32[size]``, owned by the caller."""
        return np.multiply(self.sums, np.float32(1.0 / (1.0 - self._power)))

"""A gradient as few scalars: some of its coordinates, and the rest kept for later.

The device half of a sketch with error feedback. What a round's coordinates do not carry stays in the residual and is
added to the next gradient (Seide et al., "1-bit stochastic gradient descent", Interspeech 2014; Stich et al.,
"Sparsified SGD with memory", NeurIPS 2018). Every coordinate has its turn (:mod:`.ranking`), so the residual stays
bounded.

The server half is the sum of coefficients times directions, as for every other block of an update.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, ProtocolError
from ..wire.scalar_rows import LARGEST, round_to_halves

__all__ = ["GradientSketch"]


class GradientSketch:
    """Turns one gradient a round into scalars. Not thread-safe.

    Args:
        size: Weights of the block.
        decay: How much of the residual counts in the next round, ``0 <= decay < 1``; at 1 stale parts never leave.

    Attributes:
        residual: ``float32[size]``, what was not sent yet; owned by this object.

    Raises:
        ConfigError: ``decay`` is out of range.
    """

    def __init__(self, size: int, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"the residual's decay is {decay}, it must be at least 0 and below 1")
        self._decay = np.float32(decay)
        self.residual: NDArray[np.float32] = np.zeros(size, dtype=np.float32)

    def encode(self, gradient: NDArray[np.float32], coordinates: NDArray[np.int64]) -> NDArray[np.float32]:
        """The scalars of a gradient; the residual changes.

        Args:
            gradient: ``float32[size]``, read only.
            coordinates: ``int64[n]``, those of the round, distinct.

        Returns:
            ``float32[n]``: what this round carries of each of them, in 11 bits.

        Raises:
            ProtocolError: The sum of gradient and residual is not finite, or too large. Nothing has changed then.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.multiply(self.residual, self._decay)
            np.add(total, gradient, out=total)
        if not (np.abs(total) < LARGEST).all():
            raise ProtocolError("a gradient is too large to be sketched", hint="use a smaller learning_rate")
        scalars = round_to_halves(total[coordinates])
        total[coordinates] -= scalars
        np.copyto(self.residual, total)
        return scalars

    def state(self) -> bytes:
        """The residual as it is kept on the disk, ``4 * size`` bytes: whoever goes on from it sends the same bits."""
        return self.residual.astype("<f4", copy=False).tobytes()

    def restore(self, state: bytes) -> None:
        """Go on from a :meth:`state`.

        Raises:
            ProtocolError: The bytes belong to a block of another size, or are not finite. Nothing has changed then.
        """
        if len(state) != 4 * self.residual.size:
            raise ProtocolError(
                f"a residual of {len(state)} bytes does not belong to a block of {self.residual.size} weights"
            )
        values = np.frombuffer(state, dtype="<f4")
        if not np.isfinite(values).all():
            raise ProtocolError("a residual is not finite")
        np.copyto(self.residual, values)

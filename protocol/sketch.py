"""A gradient as few scalars: its coordinates along some rows of an orthogonal basis, and the rest kept for later.

The device half of a sketch with error feedback. The rows are the Hadamard directions of one block with the signs of
round 0, so they stay the same basis for the whole run and every row comes round in turn. What a round's rows do not
carry stays in the residual and is added to the next gradient (Seide et al., "1-bit stochastic gradient descent",
Interspeech 2014; Stich et al., "Sparsified SGD with memory", NeurIPS 2018). The projection on orthonormal rows is a
contraction, so the residual stays bounded.

The server half is the sum of coefficients times directions, as for every other block of an update.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .directions import Directions
from .errors import ConfigError, ProtocolError

__all__ = ["BASIS_ROUND", "GradientSketch"]

BASIS_ROUND = 0
"""Round whose signs the basis takes, for good."""


class GradientSketch:
    """Turns one gradient a round into scalars. Not thread-safe.

    Args:
        directions: Of the block; ``hadamard``.
        decay: How much of the residual counts in the next round, ``0 <= decay < 1``; at 1 stale parts never leave.

    Attributes:
        residual: ``float32[directions.size]``, what was not sent yet; owned by this object.

    Raises:
        ConfigError: The directions are no orthogonal basis, or ``decay`` is out of range.
    """

    def __init__(self, directions: Directions, decay: float) -> None:
        if directions.family != "hadamard":
            raise ConfigError(
                f"a sketch needs orthogonal directions, {directions.family} are not", hint="use the family hadamard"
            )
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"the residual's decay is {decay}, it must be at least 0 and below 1")
        self._directions = directions
        self._decay = np.float32(decay)
        self.residual: NDArray[np.float32] = np.zeros(directions.size, dtype=np.float32)

    def encode(self, gradient: NDArray[np.float32], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """The coefficients of a gradient; the residual changes.

        Args:
            gradient: ``float32[size]``, read only.
            positions: ``int64[n]``, ascending, at most as many as the basis has rows.

        Returns:
            ``float32[n]``: coefficient times direction, summed over the positions, is what this round carries.

        Raises:
            ProtocolError: A coefficient or the rest would not be finite. Nothing has changed then.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.multiply(self.residual, self._decay)
            np.add(total, gradient, out=total)
            products = self._directions.project(BASIS_ROUND, positions, total)
            coefficients = np.divide(products, self._directions.padded).astype(np.float32)
            np.subtract(total, self._directions.combine(BASIS_ROUND, positions, coefficients), out=total)
        if not (np.isfinite(coefficients).all() and np.isfinite(total).all()):
            raise ProtocolError("a gradient is too large to be sketched", hint="use a smaller learning_rate")
        np.copyto(self.residual, total)
        return coefficients

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

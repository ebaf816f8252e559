"""Which coordinates of a sketched block travel in a round: those of which most is expected to be waiting.

A gradient is far from even: on LeNet-5 the 1.5 % of the fully connected weights whose gradients were largest so far
hold half of the next gradient's energy, 1.5 % of the rows of a random basis hold 1.5 % of it (docs/results.md). So a
coordinate's turn comes by what earlier updates have carried of it and by how long ago that was. All of this is in the
log: every side ranks alike, no index travels, and all devices of a round send the same coordinates, so that their
scalars can be added.

The order of a round is a top-k sparsification (Aji and Heafield, EMNLP 2017; Stich et al., "Sparsified SGD with
memory", NeurIPS 2018) by a public estimate in place of the device's own values. Priorities are integers, made by
operations that round the same way everywhere.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import ProtocolError
from .streams import Purpose, permutation

__all__ = ["CoordinateRanking"]

_ROUND = 16
"""Ages are counted in sixteenths of a round, so that the first ones differ and the first pass has a seeded order."""
_FLOOR = 10
"""A coordinate counts at least a tenth of the mean, so that each has its turn."""
_SMALLEST = 2.0**-100
_UNSEEN = np.float32(-1.0)


class CoordinateRanking:
    """The public memory of a sketched block. Not thread-safe.

    Args:
        seed: Run seed; orders the coordinates before anything is known of them.
        size: Weights of the block.
        block: Its number.
    """

    def __init__(self, seed: int, size: int, block: int) -> None:
        self.size = size
        self._seed, self._block = seed, block
        self._now = 0
        self._rates: NDArray[np.float32] = np.empty(size, np.float32)
        self._sent: NDArray[np.uint32] = np.empty(size, np.uint32)
        self._chosen: tuple[int, NDArray[np.int64]] | None = None
        self.restart()

    def restart(self) -> None:
        """Forget all updates."""
        self._now = 0
        self._rates.fill(_UNSEEN)
        order = permutation(self._seed, Purpose.ROWS, self._block, 0, self.size)
        # Modulo 2**32, so that a run may have any number of rounds.
        np.copyto(self._sent, (-(order % _ROUND) - 1).astype(np.uint32))
        self._chosen = None

    def chosen(self, k: int) -> NDArray[np.int64]:
        """The coordinates of the next update.

        Args:
            k: How many, ``1 <= k <= size``.

        Returns:
            ``int64[k]``, ascending; read-only.
        """
        if self._chosen is None or self._chosen[0] != k:
            priority = self._priorities()
            least = np.partition(priority, self.size - k)[self.size - k]
            taken = priority > least
            ties = np.flatnonzero(priority == least)
            taken[ties[: k - int(np.count_nonzero(taken))]] = True
            coordinates = np.flatnonzero(taken).astype(np.int64)
            coordinates.setflags(write=False)
            self._chosen = k, coordinates
        return self._chosen[1]

    def _priorities(self) -> NDArray[np.int64]:
        """Expected size times age, ``int64[size]``."""
        seen = self._rates >= 0.0
        n_seen = int(np.count_nonzero(seen))
        largest = float(self._rates.max(initial=0.0))
        if n_seen and largest > 0.0:
            exact = np.maximum(self._rates, np.float32(0.0)).astype(np.float64)  # -1 times the scale is no int64
            np.multiply(exact, 2.0**30 / largest, out=exact)
            scaled = np.floor(exact, out=exact).astype(np.int64)
            del exact  # 8 bytes a weight
            mean = int(scaled.sum()) // n_seen
            scaled[~seen] = mean
        else:
            scaled, mean = np.zeros(self.size, np.int64), 0
        scaled += mean // _FLOOR + 1
        ages = (np.uint32(self._now * _ROUND & 0xFFFFFFFF) - self._sent).astype(np.int64)
        return np.multiply(scaled, ages, out=ages)

    def combine(
        self, round_: int, positions: NDArray[np.int64], coefficients: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """The part of an update that this block has: ``float32[size]``, owned by the caller.

        Args:
            round_: As directions have it; here all that counts are the updates so far.
            positions: ``int64[k]``; must be 0 to ``k - 1``.
            coefficients: ``float32[k]``, of the chosen coordinates in ascending order.

        Raises:
            ProtocolError: The positions are others.
        """
        del round_
        k = len(positions)
        if not 0 < k <= self.size:
            raise ProtocolError(f"a sketch has the positions 0 to k - 1 of {self.size} weights, not {positions}")
        return self.combine_at(self.chosen(k), positions, coefficients)

    def combine_at(
        self, coordinates: NDArray[np.int64], positions: NDArray[np.int64], coefficients: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """:meth:`combine` for the coordinates of an earlier round, ``int64[k]``."""
        k = len(positions)
        if k != len(coordinates) or int(positions[0]) != 0 or int(positions[-1]) != k - 1:
            raise ProtocolError(f"a sketch has the positions 0 to k - 1 of {self.size} weights, not {positions}")
        out = np.zeros(self.size, np.float32)
        out[coordinates] = coefficients
        return out

    def advance(self, coefficients: NDArray[np.float32]) -> None:
        """Note what an update has carried.

        Args:
            coefficients: ``float32[k]`` of the chosen coordinates; ``k`` may be 0.
        """
        if len(coefficients):
            coordinates = self.chosen(len(coefficients))
            now = np.uint32((self._now + 1) * _ROUND & 0xFFFFFFFF)
            rounds = np.divide((now - self._sent[coordinates]).astype(np.float64), _ROUND)
            rates = np.divide(np.abs(coefficients.astype(np.float64)), np.sqrt(rounds))
            before = self._rates[coordinates].astype(np.float64)
            smoothed = np.divide(np.add(np.multiply(before, 3.0), rates), 4.0)
            rates = np.where(before >= 0.0, smoothed, rates)
            rates[rates < _SMALLEST] = 0.0
            self._rates[coordinates] = rates.astype(np.float32)
            self._sent[coordinates] = now
        self._now += 1
        self._chosen = None

    @property
    def state_bytes(self) -> int:
        """Length of a :meth:`state`."""
        return 8 * self.size

    def state(self) -> bytes:
        """What :meth:`restore` needs, little-endian."""
        return self._rates.astype("<f4", copy=False).tobytes() + self._sent.astype("<u4", copy=False).tobytes()

    def check(self, state: bytes) -> None:
        """Whether :meth:`restore` would take it.

        Raises:
            ProtocolError: The bytes belong to another block, or are damaged.
        """
        if len(state) != self.state_bytes:
            raise ProtocolError(f"{len(state)} bytes do not rank the coordinates of {self.size} weights")
        rates = np.frombuffer(state, "<f4", self.size)
        if not (np.isfinite(rates) & ((rates >= 0.0) | (rates == _UNSEEN))).all():
            raise ProtocolError("the sizes of a ranking are damaged")

    def restore(self, n_updates: int, state: bytes) -> None:
        """Go to a :meth:`state` after that many updates.

        Raises:
            ProtocolError: See :meth:`check`. Nothing has changed then.
        """
        self.check(state)
        np.copyto(self._rates, np.frombuffer(state, "<f4", self.size))
        np.copyto(self._sent, np.frombuffer(state, "<u4", self.size, 4 * self.size))
        self._now, self._chosen = n_updates, None

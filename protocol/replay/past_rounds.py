"""What a replica remembers of the latest rounds, so that late scalars of theirs can still move the weights.

A scalar of an older round stands for a direction of that round: its signs follow from that round's number, and the
coordinates of a sketch from the log as it was then. Both are in the log, so every side that replays it remembers the
same. An age counts update records: the round of age 1 is the one that made the record before.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ProtocolError

__all__ = ["PastRound", "PastRounds"]

_ROUND = struct.Struct("<I")


@dataclass(frozen=True, eq=False)
class PastRound:
    """One round that made an update.

    Attributes:
        round: Its number.
        coordinates: ``int64[k]`` of every sketched block, in the order of the blocks; read-only.
    """

    round: int
    coordinates: tuple[NDArray[np.int64], ...]


class PastRounds:
    """The rounds behind the latest records, at most as many as late scalars may be old.

    Args:
        limit: How many; 0 to remember nothing.
        sketched: Coordinates that a round has of every sketched block.
    """

    def __init__(self, limit: int, sketched: Sequence[int]) -> None:
        self.limit = limit
        self._sketched = tuple(sketched)
        self._rounds: deque[PastRound] = deque(maxlen=limit)

    def clear(self) -> None:
        """Forget all of them."""
        self._rounds.clear()

    def note(self, past: PastRound) -> None:
        """A record was applied."""
        self._rounds.append(past)

    def at(self, age: int) -> PastRound:
        """The round of an age, from 1 on.

        Raises:
            ProtocolError: No scalar may be that old.
        """
        if not 1 <= age <= len(self._rounds):
            raise ProtocolError(f"an update has scalars of {age} updates ago, at most {len(self._rounds)} may count")
        return self._rounds[-age]

    # --- snapshots --------------------------------------------------------------------------------------------------

    def state_bytes(self, index: int) -> int:
        """Length of a :meth:`state` after that many records."""
        return min(index, self.limit) * (_ROUND.size + 4 * sum(self._sketched))

    def state(self) -> bytes:
        """What :meth:`restore` needs, little-endian, the oldest first."""
        parts = []
        for past in self._rounds:
            parts.append(_ROUND.pack(past.round))
            parts += [each.astype("<u4").tobytes() for each in past.coordinates]
        return b"".join(parts)

    def read(self, state: bytes, sizes: Sequence[int]) -> list[PastRound]:
        """The rounds of a :meth:`state`, for :meth:`restore`.

        Args:
            state: Of the right length.
            sizes: Weights of every sketched block.

        Raises:
            ProtocolError: A coordinate lies outside its block.
        """
        found, start = [], 0
        while start < len(state):
            (round_,) = _ROUND.unpack_from(state, start)
            start += _ROUND.size
            coordinates = []
            for k, size in zip(self._sketched, sizes, strict=True):
                values = np.frombuffer(state, "<u4", k, start).astype(np.int64)
                if (values >= size).any() or (np.diff(values) < 1).any():
                    raise ProtocolError("the coordinates of an earlier round are damaged")
                values.setflags(write=False)
                coordinates.append(values)
                start += 4 * k
            found.append(PastRound(round_, tuple(coordinates)))
        return found

    def restore(self, rounds: Sequence[PastRound]) -> None:
        """Go on from what :meth:`read` has found."""
        self._rounds.clear()
        self._rounds.extend(rounds)

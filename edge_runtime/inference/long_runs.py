"""Copies in place of scatters, where neighbours stay neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Scatter"]

LONG_RUN: Final = 1024
"""Entries from which on a copy of their own pays."""

_PIECE: Final = 1 << 16


class Scatter:
    """Puts values to places, always the same ones.

    Fully connected layers without a mask keep their order in the tensors of a graph; to copy them as a whole takes a
    fraction of the time of a scatter.

    Args:
        places: ``intp[n]``, distinct; kept.
    """

    def __init__(self, places: NDArray[np.intp]) -> None:
        self._places = places
        self._pieces: list[tuple[int, int, int]] = []
        done = 0
        for start, stop in _long_runs(places):
            if done < start:
                self._pieces.append((done, start, -1))
            self._pieces.append((start, stop, int(places[start])))
            done = stop
        if done < places.size:
            self._pieces.append((done, int(places.size), -1))

    def write(self, values: NDArray[np.float32], target: NDArray[np.float32]) -> None:
        """Put the first values, ``float32[m]`` with ``m <= n``, to their places in ``target``."""
        for start, stop, place in self._pieces:
            if start >= values.size:
                break
            stop = min(stop, values.size)
            if place < 0:
                target[self._places[start:stop]] = values[start:stop]
            else:
                target[place : place + stop - start] = values[start:stop]


def _long_runs(places: NDArray[np.intp]) -> Iterator[tuple[int, int]]:
    """Where places that follow each other start and stop, if there are enough of them."""
    start = 0
    for first in range(1, places.size, _PIECE):  # by the piece: what is looked at takes 30 bytes a place
        breaks = np.flatnonzero(np.diff(places[first - 1 : first - 1 + _PIECE + 1]) != 1) + first
        edges = np.concatenate(([start], breaks))
        for number in np.flatnonzero(np.diff(edges) >= LONG_RUN).tolist():
            yield int(edges[number]), int(edges[number + 1])
        start = int(edges[-1])
    if places.size - start >= LONG_RUN:
        yield start, int(places.size)

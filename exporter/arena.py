"""The arena of ONNX Runtime, replayed: how large it grows over a run's tensors when it is extended as requested.

``BFCArena`` (``onnxruntime/core/framework/bfc_arena.cc``) never gives a region back. A request takes the smallest free
piece that holds it, which is split if it is twice as large; pieces merge again within their region only. So a network
whose tensors grow from layer to layer leaves regions behind that nothing fits into.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Hashable, Sequence

__all__ = ["ALIGNMENT", "Request", "arena_bytes"]

ALIGNMENT = 256
"""The arena hands out multiples of this."""

MAX_DEAD_BYTES = 128 << 20
"""A free piece that is larger by this is split as well."""

Request = tuple[Hashable, tuple[int, int] | None]
"""A tensor that is asked for, with its bytes as ``(fixed, per_sample)``; or one that is given back, with None."""

_PARTS_OF_BATCH = (1.0, 1.0, 0.6, 1.0, 0.3, 1.0)
"""Runs that are replayed: the last run over a batch has what is left of it, and the next one its pieces."""


class _Arena:
    def __init__(self) -> None:
        self.total = 0
        self._free: list[tuple[int, int]] = []  # (bytes, piece), sorted
        self._pieces: list[tuple[int, int, int]] = []  # by number: bytes, previous and next in the region or -1
        self._is_free: list[bool] = []

    def take(self, size: int) -> int:
        place = bisect_left(self._free, (size, -1))
        if place == len(self._free):
            self.total += size
            return self._new(size, -1, -1)
        found, piece = self._free.pop(place)
        self._is_free[piece] = False
        if found >= 2 * size or found - size >= MAX_DEAD_BYTES:
            _, before, after = self._pieces[piece]
            rest = self._new(found - size, piece, after)
            self._pieces[piece] = (size, before, rest)
            if after >= 0:
                self._pieces[after] = (self._pieces[after][0], rest, self._pieces[after][2])
            self._release(rest)
        return piece

    def give(self, piece: int) -> None:
        size, before, after = self._pieces[piece]
        if after >= 0 and self._is_free[after]:
            further, _, end = self._remove(after)
            size, after = size + further, end
        if before >= 0 and self._is_free[before]:
            further, start, _ = self._remove(before)
            piece, size, before = before, size + further, start
        self._pieces[piece] = (size, before, after)
        if after >= 0:
            self._pieces[after] = (self._pieces[after][0], piece, self._pieces[after][2])
        self._release(piece)

    def _new(self, size: int, before: int, after: int) -> int:
        self._pieces.append((size, before, after))
        self._is_free.append(False)
        return len(self._pieces) - 1

    def _release(self, piece: int) -> None:
        self._is_free[piece] = True
        insort(self._free, (self._pieces[piece][0], piece))

    def _remove(self, piece: int) -> tuple[int, int, int]:
        del self._free[bisect_left(self._free, (self._pieces[piece][0], piece))]
        self._is_free[piece] = False
        return self._pieces[piece]


def arena_bytes(requests: Sequence[Request], batch: int) -> int:
    """What the arena takes from the system for runs of a graph.

    Args:
        requests: Of one run, in order. What is not given back in it is at its end.
        batch: Samples of a run, at most.
    """
    arena = _Arena()
    for part in _PARTS_OF_BATCH:
        samples = math.ceil(part * batch)
        held: dict[Hashable, int] = {}
        for name, size in requests:
            if size is None:
                if name in held:
                    arena.give(held.pop(name))
                continue
            wanted = -(-(size[0] + size[1] * samples) // ALIGNMENT) * ALIGNMENT
            if wanted > 0:
                held[name] = arena.take(wanted)
        for piece in held.values():
            arena.give(piece)
    return arena.total

"""Virtual time: a queue of things that will happen."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

__all__ = ["Clock"]


class Clock:
    """Runs what is due, in the order of time and then of asking.

    Attributes:
        now: Seconds since the simulation began.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, time: float, action: Callable[..., None], *arguments: Any) -> None:
        """Call ``action(*arguments)`` at a time; at once, but behind what waits already, if that is over."""
        self._count += 1
        heapq.heappush(self._queue, (max(time, self.now), self._count, action, arguments))

    @property
    def next(self) -> float | None:
        """When the next thing happens; None if nothing will."""
        return self._queue[0][0] if self._queue else None

    def step(self) -> None:
        """Let the next thing happen."""
        self.now, _, action, arguments = heapq.heappop(self._queue)
        action(*arguments)

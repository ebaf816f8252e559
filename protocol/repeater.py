"""Something that is sent again and again until an answer comes."""

from __future__ import annotations

import math

__all__ = ["Backoff", "Repeater"]


class Repeater:
    """The clock of one repeated message.

    Args:
        period_s: Time between two sendings.
    """

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._next = -math.inf

    @property
    def wakeup(self) -> float | None:
        """When it is due again; None if nothing was sent that still counts."""
        return self._next if math.isfinite(self._next) else None

    def is_due(self, now: float) -> bool:
        """Whether to send it now; notes the time if so."""
        if now < self._next:
            return False
        self._next = now + self._period_s
        return True

    def postpone(self, now: float) -> None:
        """It was sent for another reason."""
        self._next = now + self._period_s

    def forget(self) -> None:
        """It is due at once: it was answered, or lost with the link."""
        self._next = -math.inf


class Backoff:
    """The clock of a message that is repeated ever more rarely: after 1, 2, 4 and so on periods.

    Args:
        period_s: Time until it is sent first.
        longest_s: Time between two sendings at most.
    """

    def __init__(self, period_s: float, longest_s: float) -> None:
        self._period_s, self._longest_s = period_s, max(period_s, longest_s)
        self._wait_s = period_s
        self._next = math.inf

    @property
    def wakeup(self) -> float | None:
        """When it is due; None before it was started."""
        return self._next if math.isfinite(self._next) else None

    def start(self, now: float) -> None:
        """Begin anew."""
        self._wait_s = self._period_s
        self._next = now + self._wait_s

    def is_due(self, now: float) -> bool:
        """Whether to send it now; notes the time if so."""
        if now < self._next:
            return False
        self._wait_s = min(2 * self._wait_s, self._longest_s)
        self._next = now + self._wait_s
        return True

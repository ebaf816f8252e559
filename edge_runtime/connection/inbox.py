"""What a loop has to do next, with a limit above which the network waits.

Messages are never dropped here: above the limit the transport stops reading its socket, so the broker keeps what comes
next, and devices send again what a broker loses. Events of this process itself are few and always taken.
"""

from __future__ import annotations

import queue
from typing import Generic, TypeVar

from .mqtt_types import Arrived

__all__ = ["Inbox"]

Event = TypeVar("Event")


class Inbox(Generic[Event]):
    """A first-in, first-out queue between the network thread and one loop.

    Args:
        max_messages: Events that may wait before the network has to.
        max_bytes: Likewise, payloads of messages.

    Attributes:
        max_messages: See above.
        max_bytes: See above.
        pauses: How often the network had to wait.
        peak: Most events that waited at a time.
    """

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self.max_messages, self.max_bytes = max_messages, max_bytes
        self.pauses = self.peak = 0
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        # Each is written by one thread only, so they need no lock.
        self._bytes_in = self._bytes_out = 0
        self._is_full = False

    def __len__(self) -> int:
        """Events that wait."""
        return self._events.qsize()

    @property
    def bytes(self) -> int:
        """Payloads of the messages that wait."""
        return self._bytes_in - self._bytes_out

    def put(self, event: Event) -> None:
        """Add an event; messages come from the network thread only, other events from any thread."""
        if isinstance(event, Arrived):
            self._bytes_in += len(event.payload)
        self._events.put(event)

    def get(self, timeout: float | None = None) -> Event:
        """Take the next event.

        Raises:
            queue.Empty: There was none in time.
        """
        event = self._events.get(timeout=timeout)
        if isinstance(event, Arrived):
            self._bytes_out += len(event.payload)
        return event

    def empty(self) -> bool:
        """Whether nothing waits."""
        return self._events.empty()

    def has_room(self) -> bool:
        """Whether the network may go on; once full, not before half is done. For the network thread."""
        depth = len(self)
        self.peak = max(self.peak, depth)
        share = 2 if self._is_full else 1
        full = depth * share >= self.max_messages or self.bytes * share >= self.max_bytes
        self.pauses += full and not self._is_full
        self._is_full = full
        return not full

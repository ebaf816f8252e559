"""The publishes of a transport that are not finished yet, in order."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

from .mqtt_types import Publication

__all__ = ["Outgoing", "SendQueue"]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A publication and its number; `expires_at` is a `time.monotonic` value."""

    message_id: int
    publication: Publication
    expires_at: float | None

    def seconds_left(self) -> float | None:
        """Time until the message is not worth sending; None when it always is."""
        return None if self.expires_at is None else self.expires_at - time.monotonic()


class SendQueue:
    """A bounded queue that keeps each entry until it is finished. Any thread adds; the network thread takes.

    Args:
        capacity: Most entries, waiting and sent together.
        max_bytes: Most bytes of their payloads; a single one may be larger.
        changed: Notified when the queue becomes empty; its lock guards everything.

    Attributes:
        capacity: See above.
        max_bytes: See above.
        bytes: Payloads of all entries.
        overflowed: Publications that found no room so far.
        forgotten: Of these, those of QoS 0, which nobody is told about.
    """

    def __init__(self, capacity: int, max_bytes: int, changed: threading.Condition) -> None:
        self.capacity, self.max_bytes = capacity, max_bytes
        self.bytes = self.overflowed = self.forgotten = 0
        self._changed = changed
        self._entries: dict[int, Outgoing] = {}  # in order of message id
        self._unsent: deque[int] = deque()
        self._overflow: deque[int] = deque()
        self._last_id = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, message_id: object) -> bool:
        return message_id in self._entries

    def add(self, publication: Publication, expiry_s: float | None, *, connected: bool) -> int:
        """Append a publication and return its id. QoS 0 is forgotten at once while there is no connection."""
        expires_at = None if expiry_s is None else time.monotonic() + expiry_s
        with self._changed:
            self._last_id += 1
            message_id = self._last_id
            if publication.qos == 0 and not connected:
                return message_id
            size = len(publication.payload)
            if not self._entries or (len(self._entries) < self.capacity and self.bytes + size <= self.max_bytes):
                self._entries[message_id] = Outgoing(message_id, publication, expires_at)
                self._unsent.append(message_id)
                self.bytes += size
            else:
                self.overflowed += 1
                if publication.qos:
                    self._overflow.append(message_id)
                else:
                    self.forgotten += 1
            return message_id

    def take(self) -> Outgoing | None:
        """Return the next entry to send; it stays in the queue until `finish`."""
        with self._changed:
            return self._entries[self._unsent.popleft()] if self._unsent else None

    def take_overflow(self) -> int | None:
        """Return the id of a QoS 1 message that found no room."""
        with self._changed:
            return self._overflow.popleft() if self._overflow else None

    def finish(self, message_id: int) -> None:
        """Forget an entry."""
        with self._changed:
            self.bytes -= len(self._entries.pop(message_id).publication.payload)
            if not self._entries:
                self._changed.notify_all()

    def drop_unsent(self) -> None:
        """Forget, without a word, what has not been sent on this connection."""
        with self._changed:
            while self._unsent:
                self.finish(self._unsent.popleft())

    def link_lost(self) -> None:
        """Make everything wait again, oldest first, and drop what is QoS 0."""
        with self._changed:
            self._entries = {id_: entry for id_, entry in self._entries.items() if entry.publication.qos}
            self._unsent = deque(self._entries)
            self.bytes = sum(len(entry.publication.payload) for entry in self._entries.values())
            self._changed.notify_all()

"""What is committed together: many reports that arrive at about the same time share one sync of the disk.

A sync takes some milliseconds however much it writes, so each report by itself would make a few hundred a second
durable. The first event of a batch waits for others for 4 ms at most, and no longer than they come one behind the
other: a broker that lets only some messages wait for their acknowledgement (20 by default in Mosquitto) sends no more
before the batch is committed. What arrives during a commit is in the next batch, so batches grow with the load.
"""

from __future__ import annotations

import queue
import time
from typing import Final, Protocol, TypeVar

__all__ = ["BATCH_EVENTS", "BATCH_S", "QUIET_S", "gather"]

BATCH_S: Final = 0.004
QUIET_S: Final = 0.001
BATCH_EVENTS: Final = 2_000

Event_co = TypeVar("Event_co", covariant=True)


class _Events(Protocol[Event_co]):
    """A queue."""

    def get(self, timeout: float | None = None) -> Event_co:
        """Take the next event; raises ``queue.Empty``."""


def gather(events: _Events[Event_co], wait_s: float) -> list[Event_co]:
    """The next batch.

    Args:
        events: Where it comes from.
        wait_s: How long to wait for its first event.

    Returns:
        1 to 2,000 events, in order.

    Raises:
        queue.Empty: There was none in time.
    """
    batch = [events.get(timeout=wait_s)]
    until = time.monotonic() + BATCH_S
    while len(batch) < BATCH_EVENTS and (left_s := until - time.monotonic()) > 0:
        try:
            batch.append(events.get(timeout=min(left_s, QUIET_S)))
        except queue.Empty:
            break
    return batch

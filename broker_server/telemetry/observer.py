"""The seam for whoever watches a server: what it did in each turn, and how it stands now.

A watcher changes nothing: it gets what was decided and sent already, and what it raises is logged and forgotten.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ...protocol.server_side.coordinator_events import CoordinatorCommand, CoordinatorEvent

__all__ = ["Queue", "ServerState", "Telemetry", "Turn", "Watchers"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the server's loop: a batch of events, what followed, and when, by ``time.monotonic``.

    Attributes:
        events: What the coordinator was told.
        commands: What it decided.
        began: The batch is complete.
        decided: The coordinator has seen all of it.
        committed: What it recorded is durable.
        ended: Everything is handed to the transport.
    """

    events: Sequence[CoordinatorEvent]
    commands: Sequence[CoordinatorCommand]
    began: float
    decided: float
    committed: float
    ended: float


class Telemetry(Protocol):
    """A watcher."""

    def turn(self, turn: Turn) -> None:
        """Take note of a turn. Called on the server's thread, so it must be quick."""


class Watchers:
    """Several watchers as one; a watcher that raises is dropped, and the run goes on.

    Args:
        watchers: Asked in this order.
    """

    def __init__(self, *watchers: Telemetry) -> None:
        self._watchers = list(watchers)

    def turn(self, turn: Turn) -> None:
        """See :meth:`Telemetry.turn`."""
        for watcher in list(self._watchers):
            try:
                watcher.turn(turn)
            except Exception:  # noqa: BLE001 (whatever it is, a run does not end because of who watches it)
                _log.exception("%s failed and is left out from now on", type(watcher).__name__)
                self._watchers.remove(watcher)


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue of the server.

    Attributes:
        name: ``inbound``, ``outbound`` or ``passes``.
        depth: Entries now.
        limit: Most entries; 0 where their number follows from something else.
        bytes: Payloads now.
        max_bytes: Most bytes; 0 for no limit of its own.
    """

    name: str
    depth: int
    limit: int
    bytes: int = 0
    max_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ServerState:
    """How a server stands, taken while it works; may be asked for on any thread.

    Attributes:
        run: Run id.
        phase: Of the announced round.
        round: Its number.
        updates: Updates made.
        updates_total: Updates to make.
        devices: Enrolled devices by state: a presence's status, ``silent`` or ``excused``.
        is_connected: The link to the broker is up.
        is_leaving: The server was asked to stop.
        turned_s_ago: Seconds since the loop last turned.
        queues: All of them.
        dropped: What was given up so far, by reason.
        pauses: How often reading from the broker paused because the loop was behind.
        bytes_in: MQTT bytes received.
        bytes_out: MQTT bytes sent.
        messages_in: PUBLISH packets received.
        messages_out: PUBLISH packets sent.
    """

    run: str
    phase: str
    round: int
    updates: int
    updates_total: int
    devices: Mapping[str, int]
    is_connected: bool
    is_leaving: bool
    turned_s_ago: float
    queues: tuple[Queue, ...]
    dropped: Mapping[str, int]
    pauses: int
    bytes_in: int
    bytes_out: int
    messages_in: int
    messages_out: int

"""What people are told while boards join: who is ready, who takes no part and why."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from ...protocol.server_side.coordinator import Coordinator
from ...protocol.server_side.coordinator_events import DeviceSaid, Record
from ...protocol.wire.documents import Presence
from .observer import Turn

__all__ = ["Joining"]

IN_FULL = 10  # boards that get a line of their own, of each kind
PAUSE_S = 5.0  # between two counts of the others
MAX_KEPT = 1000  # refusals


class Joining:
    """Watches a server; see :class:`~.observer.Telemetry`. One for all runs of a process.

    Args:
        say: Takes a line for people.
        warn: Takes one about something that keeps a board away.
    """

    def __init__(self, say: Callable[[str], None], warn: Callable[[str], None]) -> None:
        self._say, self._warn = say, warn
        self._coordinator: Coordinator | None = None
        self._keep: Callable[[Mapping[str, str]], None] = lambda _: None

    def attach(self, coordinator: Coordinator, keep: Callable[[Mapping[str, str]], None]) -> None:
        """From now on watch this run.

        Args:
            coordinator: Looked at in each turn.
            keep: Takes who takes no part, with the reason, when that has changed.
        """
        self._coordinator, self._keep = coordinator, keep
        self._is_gathering = True
        self._ready: set[str] = set()
        self._refused: dict[str, str] = {}
        self._lines = self._warnings = 0
        self._counted_at = -PAUSE_S

    def turn(self, turn: Turn) -> None:
        """See :meth:`.observer.Telemetry.turn`."""
        if self._coordinator is None:
            return
        before = dict(self._refused) if self._refused else None
        for event in turn.events:
            if isinstance(event, DeviceSaid) and isinstance(event.message, Presence):
                self._look(self._coordinator, event.device, event.message)
        if (self._refused or None) != before:
            self._keep(dict(self._refused))
        # A run that goes on from its journal gathers its boards as well.
        if any(isinstance(command, Record) and command.kind == "announce" for command in turn.commands):
            self._is_gathering = False

    def _look(self, coordinator: Coordinator, name: str, presence: Presence) -> None:
        member = coordinator.roster.get(name)
        if presence.run not in ("", coordinator.run.run) or (member is not None and presence.session < member.session):
            return  # Of another run or an earlier process.
        if presence.status == "refused":
            if name not in self._refused and len(self._refused) < MAX_KEPT:
                self._refused[name] = presence.detail
                self._warnings += 1
                if self._warnings <= IN_FULL:
                    self._warn(f"{name} takes no part: {presence.detail or 'it gives no reason'}")
                else:
                    self._tell_count(f"{len(self._refused)} boards take no part")
            return
        self._refused.pop(name, None)
        if presence.status != "ready":
            self._ready.discard(name)
        elif self._is_gathering and name not in self._ready and member is not None:
            self._ready.add(name)
            count, wanted = len(self._ready), coordinator.run.settings.devices
            self._lines += 1
            if self._lines <= IN_FULL:
                self._say(f"{name} is ready: {count} of {wanted}")
            else:
                self._tell_count(f"{count} of {wanted} boards are ready")

    def _tell_count(self, text: str) -> None:
        now = time.monotonic()
        if now >= self._counted_at + PAUSE_S:
            self._counted_at = now
            self._say(text)

"""What a server that starts reads of its journal: the newest snapshot, what it leaves out, and all that came after."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from ...protocol.errors import ProtocolError
from ...protocol.server_side.coordinator import Coordinator
from ...protocol.server_side.coordinator_events import CoordinatorCommand, RecordKind
from ..journal import Entry, Journal

__all__ = ["entries_to_resume", "keep_last_snapshot", "resume"]

_log = logging.getLogger(__name__)

_LASTING: tuple[RecordKind, ...] = ("run", "enrolment", "evaluation")
"""Few and small, so that snapshots do not repeat them; masks as well, of which only the last one counts."""

PlainEntry = tuple[RecordKind, int, str, bytes]


def resume(make: Callable[[], Coordinator], journal: Journal) -> tuple[Coordinator, list[CoordinatorCommand]]:
    """A coordinator in the state of the journal's last entry.

    A snapshot that is damaged, or of a release that kept another state, counts as none: then everything is replayed.

    Args:
        make: Makes a new coordinator.
        journal: Its journal.

    Returns:
        The coordinator and its commands, see :meth:`~fedzo.protocol.server_side.coordinator.Coordinator.restore`.

    Raises:
        ProtocolError: The journal belongs to another run, or replaying it gives other weights.
    """
    coordinator, snapshots = make(), journal.sequences("snapshot")
    if snapshots:
        try:
            return coordinator, coordinator.restore(entries_to_resume(journal, snapshots[-1]))
        except ProtocolError as error:
            _log.warning("the whole journal is replayed: %s", error.message)
            coordinator = make()
    whole = (_plain(entry) for _, entry in journal.read() if entry.kind != "snapshot")
    return coordinator, coordinator.restore(whole)


def entries_to_resume(journal: Journal, snapshot: int) -> Iterator[PlainEntry]:
    """The entries that give a coordinator the state of the whole journal.

    Args:
        journal: The journal.
        snapshot: Sequence of its newest snapshot.

    Yields:
        ``(kind, round, device, payload)``
    """
    for sequence, entry in journal.read(_LASTING):
        if sequence > snapshot:
            break
        yield _plain(entry)
    mask = max((sequence for sequence in journal.sequences("mask") if sequence < snapshot), default=0)
    if mask:
        yield _plain(journal.get(mask))
    for _, entry in journal.read(from_sequence=snapshot):
        yield _plain(entry)


def keep_last_snapshot(journal: Journal, kinds: set[RecordKind]) -> None:
    """Remove older snapshots, if one is among the kinds that were just recorded."""
    if "snapshot" in kinds:
        journal.drop_snapshots()


def _plain(entry: Entry) -> PlainEntry:
    return entry.kind, entry.round, entry.device, entry.payload

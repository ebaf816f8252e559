"""What a server that starts reads of its journal: the newest snapshot, what it leaves out, and all that came after."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from ..protocol.coordinator_events import RecordKind
from ..protocol.errors import ProtocolError
from ..protocol.snapshots import Snapshot
from .journal import Entry, Journal

__all__ = ["entries_to_resume", "keep_last_snapshot"]

_log = logging.getLogger(__name__)

_LASTING: tuple[RecordKind, ...] = ("run", "enrolment", "evaluation")
"""Few and small, so that snapshots do not repeat them; masks as well, of which only the last one counts."""


def entries_to_resume(journal: Journal) -> Iterator[tuple[RecordKind, int, str, bytes]]:
    """The entries that give a coordinator the state of the whole journal.

    A snapshot that is damaged counts as none: then everything is replayed.

    Yields:
        ``(kind, round, device, payload)`` for :meth:`~fedzo.protocol.coordinator.Coordinator.restore`.
    """
    newest = next(reversed(journal.sequences("snapshot")), 0)
    is_whole = newest > 0 and _is_whole(journal, newest)
    if is_whole:
        for _, entry in _until(journal, newest):
            yield _plain(entry)
        mask = max((sequence for sequence in journal.sequences("mask") if sequence < newest), default=0)
        if mask:
            yield _plain(journal.get(mask))
    for sequence, entry in journal.read(from_sequence=newest if is_whole else 0):
        if is_whole or sequence != newest:
            yield _plain(entry)


def keep_last_snapshot(journal: Journal, kinds: set[RecordKind]) -> None:
    """Remove older snapshots, if one is among the kinds that were just recorded."""
    if "snapshot" in kinds:
        journal.drop_snapshots()


def _plain(entry: Entry) -> tuple[RecordKind, int, str, bytes]:
    return entry.kind, entry.round, entry.device, entry.payload


def _until(journal: Journal, sequence: int) -> Iterator[tuple[int, Entry]]:
    for number, entry in journal.read(_LASTING):
        if number > sequence:
            return
        yield number, entry


def _is_whole(journal: Journal, sequence: int) -> bool:
    try:
        Snapshot.decode(journal.get(sequence).payload)
    except ProtocolError as error:
        _log.warning("the snapshot %d of the journal is ignored: %s", sequence, error.message)
        return False
    return True

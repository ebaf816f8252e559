"""The seam between the server and its memory: what every store of entries has to do."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ...protocol.errors import FedzoError
from ...protocol.server_side.coordinator_events import RecordKind
from .entry import KINDS, Entry

__all__ = ["DuplicateEntry", "Journal", "Tally", "check_keep", "check_kinds", "duplicate"]


class DuplicateEntry(FedzoError):  # noqa: N818 (named for what it is)
    """A report of this round and device is in the journal already; nothing of the call was stored."""


@dataclass(frozen=True, slots=True)
class Tally:
    """The entries of one kind in one round, added up.

    Attributes:
        round: The round.
        kind: The kind.
        count: How many there are.
        payload_bytes: Size of their payloads together.
        first_at: Unix time of the first in seconds.
        last_at: Of the last.
    """

    round: int
    kind: RecordKind
    count: int
    payload_bytes: int
    first_at: float
    last_at: float


class Journal(Protocol):
    """What the server records, in order. Safe to use from any thread."""

    def append(self, entries: Sequence[Entry]) -> list[int]:
        """Store all entries or none, durably, and return their sequence numbers, which ascend.

        One call is one commit: whoever has many entries at hand passes them together.

        Raises:
            DuplicateEntry: A second report for the same round and device.
            FedzoError: The journal cannot be written (disk full, input or output error).
        """

    def read(
        self, kinds: Collection[str] | None = None, from_sequence: int = 0, *, round_: int | None = None
    ) -> Iterator[tuple[int, Entry]]:
        """Yield ``(sequence, entry)`` in order, from a sequence number on, of some kinds or all, of a round or all."""

    def get(self, sequence: int) -> Entry:
        """Return one entry.

        Raises:
            KeyError: There is none.
        """

    def sequences(self, kind: str) -> list[int]:
        """Where the entries of a kind are, in order, without reading them."""

    def count_before(self, kind: str, marks: Sequence[int]) -> list[int]:
        """How many entries of a kind lie in front of each of some places, without remembering where."""

    def tally(self) -> list[Tally]:
        """What there is, by round and kind, in the order of rounds and of first entries."""

    def drop_snapshots(self, keep: int = 1) -> None:
        """Remove all snapshots but the newest ``keep``: what they hold follows from the entries before them.

        Nothing else ever leaves a journal. Sequence numbers of what was removed are not used again.
        """

    @property
    def last_sequence(self) -> int:
        """Sequence number of the newest entry, 0 when empty."""

    def close(self) -> None:
        """Free it. Idempotent."""


def check_kinds(kinds: Collection[str] | None) -> None:
    """Refuse a kind that no entry can have.

    Raises:
        ValueError: There is one.
    """
    unknown = set(kinds or ()) - KINDS
    if unknown:
        raise ValueError(f"{min(unknown)!r} is no kind of entry; known are {sorted(KINDS)}")


def check_keep(keep: int) -> None:
    """Refuse to remove the newest snapshot.

    Raises:
        ValueError: ``keep`` is less than 1.
    """
    if keep < 1:
        raise ValueError(f"{keep} snapshots cannot be kept; it must be 1 or more")


def duplicate(entries: Sequence[Entry]) -> DuplicateEntry:
    """The error for a call that would store a report twice."""
    names = ", ".join(f"({entry.round}, {entry.device!r})" for entry in entries if entry.kind == "report")
    return DuplicateEntry(f"one of the reports (round, device) {names[:200]} is in the journal already")

"""A journal in memory."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence

from .entry import Entry
from .seam import Tally, check_keep, check_kinds, duplicate

__all__ = ["MemoryJournal"]


class MemoryJournal:
    """A journal for tests and simulations: as strict as the real one, but gone with the process."""

    def __init__(self) -> None:
        self._entries: list[Entry | None] = []  # None where a snapshot was removed
        self._reports: set[tuple[int, str]] = set()
        self._lock = threading.Lock()

    def append(self, entries: Sequence[Entry]) -> list[int]:
        """See `Journal.append`."""
        with self._lock:
            added: set[tuple[int, str]] = set()
            for entry in entries:
                if entry.kind == "report":
                    key = (entry.round, entry.device)
                    if key in added or key in self._reports:
                        raise duplicate(entries)
                    added.add(key)
            self._reports |= added
            first = len(self._entries) + 1
            self._entries += entries
            return list(range(first, len(self._entries) + 1))

    def read(
        self, kinds: Collection[str] | None = None, from_sequence: int = 0, *, round_: int | None = None
    ) -> Iterator[tuple[int, Entry]]:
        """See `Journal.read`."""
        check_kinds(kinds)
        return self._read(kinds, max(0, from_sequence - 1), round_)

    def _read(self, kinds: Collection[str] | None, position: int, round_: int | None) -> Iterator[tuple[int, Entry]]:
        while position < len(self._entries):
            entry = self._entries[position]
            position += 1
            if entry is None or (kinds is not None and entry.kind not in kinds):
                continue
            if round_ is None or entry.round == round_:
                yield position, entry

    def get(self, sequence: int) -> Entry:
        """See `Journal.get`."""
        entry = self._entries[sequence - 1] if 1 <= sequence <= len(self._entries) else None
        if entry is None:
            raise KeyError(sequence)
        return entry

    def sequences(self, kind: str) -> list[int]:
        """See `Journal.sequences`."""
        return [sequence for sequence, _ in self.read({kind})]

    def count_before(self, kind: str, marks: Sequence[int]) -> list[int]:
        """See `Journal.count_before`."""
        places = self.sequences(kind)
        return [bisect_left(places, mark) for mark in marks]

    def tally(self) -> list[Tally]:
        """See `Journal.tally`."""
        groups: dict[tuple[int, str], list[Entry]] = {}
        for _, entry in self.read():
            groups.setdefault((entry.round, entry.kind), []).append(entry)
        return [
            Tally(
                group[0].round,
                group[0].kind,
                len(group),
                sum(len(entry.payload) for entry in group),
                min(entry.at for entry in group),
                max(entry.at for entry in group),
            )
            for group in sorted(groups.values(), key=lambda group: group[0].round)
        ]

    def drop_snapshots(self, keep: int = 1) -> None:
        """See `Journal.drop_snapshots`."""
        check_keep(keep)
        with self._lock:
            for sequence in self.sequences("snapshot")[:-keep]:
                self._entries[sequence - 1] = None

    @property
    def last_sequence(self) -> int:
        """See `Journal.last_sequence`."""
        return len(self._entries)

    def close(self) -> None:
        """See `Journal.close`."""

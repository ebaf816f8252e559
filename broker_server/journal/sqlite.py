"""A journal in one SQLite file."""

# ruff: noqa: S608 (the queries are put together of constants; all values are bound)

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import quote

from ...protocol.errors import ConfigError, FedzoError
from .entry import KINDS, Entry
from .schema import check_file, check_pages, damaged
from .seam import Tally, check_keep, check_kinds, duplicate

if TYPE_CHECKING:
    from typing_extensions import Self  # typing.Self came with Python 3.11

__all__ = ["SqliteJournal"]

_PAGE_ENTRIES = 256
_PAGE_SEQUENCES = 16_384
_BUSY_TIMEOUT_S = 10.0
_COLUMNS = "kind, round, device, payload, at"


class SqliteJournal:
    """A journal in one SQLite file, mode 0600, in write-ahead mode with a sync at every commit.

    One writer at a time, held by a lock on ``PATH.lock`` that ends with the process; readers at any time.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the file, make it when it is missing.

        Args:
            path: The file; its folder must exist.
            read_only: Look into a journal while a server writes it, or after.

        Raises:
            ConfigError: Another process writes this journal, or the path cannot be used.
            ArtifactError: The file is damaged, no journal, or of a newer fedzo.
        """
        self._path = path
        self._lock = threading.RLock()
        self._guard: int | None = None
        self._connection: sqlite3.Connection | None = None
        self._last = 0
        if read_only and not path.is_file():
            raise ConfigError(f"there is no journal {path}", hint="check the path of the run")
        try:
            if not read_only:
                self._guard = _lock(path)
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            with self._explained():
                self._connection = _open(path, read_only=read_only)
                check_file(self._connection, path, read_only=read_only)
                self._last = self._newest()
        except OSError as error:
            self.close()
            raise ConfigError(
                f"cannot open the journal {path}: {error.strerror}", hint="check that the folder exists and is writable"
            ) from None
        except BaseException:
            self.close()
            raise

    def append(self, entries: Sequence[Entry]) -> list[int]:
        """See `Journal.append`; one transaction and one sync per call, so batches are cheap."""
        with self._lock, self._explained():
            connection, first = self._open_connection, self._last + 1
            rows = [(n, e.kind, e.round, e.device, e.payload, e.at) for n, e in enumerate(entries, start=first)]
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.executemany(f"INSERT INTO entry (sequence, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)", rows)
                connection.execute("COMMIT")
            except BaseException as error:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.IntegrityError) and "UNIQUE" in str(error):
                    raise duplicate(entries) from None
                raise
            self._last += len(rows)
        return list(range(first, first + len(rows)))

    def read(
        self, kinds: Collection[str] | None = None, from_sequence: int = 0, *, round_: int | None = None
    ) -> Iterator[tuple[int, Entry]]:
        """See `Journal.read`; holds a page of 256 entries, and sees what is appended meanwhile."""
        check_kinds(kinds)
        if kinds is None and round_ is None:
            return self._read_all(from_sequence)
        return self._read_some(sorted(KINDS if kinds is None else kinds), from_sequence, round_)

    def _read_all(self, next_sequence: int) -> Iterator[tuple[int, Entry]]:
        query = f"SELECT sequence, {_COLUMNS} FROM entry WHERE sequence >= ? ORDER BY sequence LIMIT ?"
        while page := self._rows(query, (next_sequence, _PAGE_ENTRIES)):
            yield from self._entries(page)
            next_sequence = self._after(next_sequence, page[-1][0])

    def _read_some(self, kinds: list[str], next_sequence: int, round_: int | None) -> Iterator[tuple[int, Entry]]:
        """Sequences first, out of an index: sorting whole entries of several kinds would cost far more."""
        while found := self._find(kinds, next_sequence, round_):
            for start in range(0, len(found), _PAGE_ENTRIES):
                part = found[start : start + _PAGE_ENTRIES]
                marks = ", ".join("?" * len(part))
                query = f"SELECT sequence, {_COLUMNS} FROM entry WHERE sequence IN ({marks}) ORDER BY sequence"
                yield from self._entries(self._rows(query, part))
            next_sequence = self._after(next_sequence, found[-1])

    def _after(self, first: int, last: int) -> int:
        """Where the next page begins; in a damaged file entries may come in any order, and reading would not end."""
        if last < first:
            raise damaged(self._path, f"entry {last} comes where entry {first} or a later one should")
        return last + 1

    def _find(self, kinds: list[str], first: int, round_: int | None) -> list[int]:
        """Up to 16,384 ascending sequences of some kinds; reports have no place in the indices of the others."""
        others = [kind for kind in kinds if kind != "report"]
        marks = ", ".join("?" * len(others))
        in_round = "" if round_ is None else "round = ? AND "
        rounds = () if round_ is None else (round_,)
        parts, values = [], list[object]()
        if "report" in kinds:
            parts.append(f"SELECT sequence FROM entry WHERE {in_round}kind = 'report' AND sequence >= ?")
            values += [*rounds, first]
        if others:
            where = f"{in_round}kind <> 'report' AND kind IN ({marks}) AND sequence >= ?"
            parts.append(f"SELECT sequence FROM entry WHERE {where}")
            values += [*rounds, *others, first]
        if not parts:
            return []
        query = f"{' UNION ALL '.join(parts)} ORDER BY sequence LIMIT {_PAGE_SEQUENCES}"
        return [row[0] for row in self._rows(query, values)]

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[tuple[int, ...]]:
        with self._lock, self._explained():
            return self._open_connection.execute(query, values).fetchall()

    def _entries(self, page: list[tuple[int, ...]]) -> Iterator[tuple[int, Entry]]:
        for sequence, *columns in page:
            yield sequence, self._entry(sequence, columns)

    def get(self, sequence: int) -> Entry:
        """See `Journal.get`."""
        query = "SELECT kind, round, device, payload, at FROM entry WHERE sequence = ?"
        with self._lock, self._explained():
            row = self._open_connection.execute(query, (sequence,)).fetchone()
        if row is None:
            raise KeyError(sequence)
        return self._entry(sequence, row)

    def sequences(self, kind: str) -> list[int]:
        """See `Journal.sequences`."""
        check_kinds([kind])
        report = "" if kind == "report" else "kind <> 'report' AND "
        return [row[0] for row in self._rows(f"SELECT sequence FROM entry WHERE {report}kind = ? ORDER BY 1", (kind,))]

    def count_before(self, kind: str, marks: Sequence[int]) -> list[int]:
        """See `Journal.count_before`."""
        check_kinds([kind])
        report = "" if kind == "report" else "kind <> 'report' AND "
        if not marks:
            return []
        sums = ", ".join("coalesce(sum(sequence < ?), 0)" for _ in marks)
        (row,) = self._rows(f"SELECT {sums} FROM entry WHERE {report}kind = ?", (*marks, kind))
        return list(row)

    def tally(self) -> list[Tally]:
        """See `Journal.tally`; reads the whole file."""
        sums = "count(*), sum(length(payload)), min(at), max(at)"
        query = f"SELECT round, kind, {sums} FROM entry GROUP BY round, kind ORDER BY round, min(sequence)"
        return [Tally(*row) for row in self._rows(query)]  # type: ignore[arg-type]

    def drop_snapshots(self, keep: int = 1) -> None:
        """See `Journal.drop_snapshots`; later entries take the place in the file."""
        check_keep(keep)
        old = self.sequences("snapshot")[:-keep]
        if old:
            marks = ", ".join("?" * len(old))
            with self._lock, self._explained():
                self._open_connection.execute(f"DELETE FROM entry WHERE sequence IN ({marks})", old)

    def check(self) -> None:
        """Read the whole file, which opening does for small ones only.

        Raises:
            ArtifactError: It is damaged.
        """
        with self._lock, self._explained():
            check_pages(self._open_connection, self._path)

    @property
    def last_sequence(self) -> int:
        """See `Journal.last_sequence`."""
        return int(self._rows("SELECT max(sequence) FROM entry")[0][0] or 0)

    def close(self) -> None:
        """See `Journal.close`; lets the next writer in."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            if self._guard is not None:
                os.close(self._guard)  # which also releases the lock
                self._guard = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _newest(self) -> int:
        """The last sequence that was ever used."""
        row = self._open_connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'entry'").fetchone()
        return int(row[0]) if row else 0

    @property
    def _open_connection(self) -> sqlite3.Connection:
        if self._connection is None:
            raise FedzoError(f"the journal {self._path} is closed")
        return self._connection

    def _entry(self, sequence: int, columns: Sequence[object]) -> Entry:
        try:
            return Entry(*columns)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise damaged(self._path, f"entry {sequence}: {error}") from None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn SQLite's errors into fedzo's."""
        try:
            yield
        except sqlite3.OperationalError as error:
            text = str(error)
            if "full" in text:
                hint = "free some space and start the server again; what was acknowledged is safe"
                raise FedzoError(f"no space left for the journal {self._path}", hint=hint) from error
            if "locked" in text:
                hint = "another program holds the file; close it"
                raise FedzoError(f"the journal {self._path} is locked", hint=hint) from error
            if "malformed" in text or "no such" in text:
                raise damaged(self._path, text) from error
            rights = "unable to open" in text or "readonly" in text or "permission" in text
            hint = "check the rights of this user to the file and its folder" if rights else "check the disk"
            raise FedzoError(f"the journal {self._path} cannot be used: {text}", hint=hint) from error
        except sqlite3.DataError as error:
            raise FedzoError(f"the journal {self._path} takes no entry as large as this: {error}") from error
        except sqlite3.DatabaseError as error:
            raise damaged(self._path, str(error)) from error


def _lock(path: Path) -> int:
    """Take the writer's lock of a journal and return its file handle.

    A file of its own, because SQLite holds POSIX locks on the journal itself, which closing any other handle of the
    same file would drop.
    """
    name = path.with_name(path.name + ".lock")
    handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.write(handle, b"%d\n" % os.getpid())
    except BlockingIOError:
        owner = os.read(handle, 20).decode("ascii", "replace").strip()
        os.close(handle)
        raise ConfigError(
            f"the journal {path} is in use by process {owner or 'unknown'}",
            hint="only one server can run it; stop the other one, or choose another run folder",
        ) from None
    except BaseException:
        os.close(handle)
        raise
    return handle


def _open(path: Path, *, read_only: bool) -> sqlite3.Connection:
    if not read_only:
        return _connect(path, "mode=rw")
    connection = _connect(path, "mode=ro")
    try:
        connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.DatabaseError as error:
        connection.close()
        if not isinstance(error, sqlite3.OperationalError) or path.with_name(path.name + "-wal").exists():
            raise
        # Even a reader makes the index of the write-ahead log. Where it cannot, on read-only media, nobody writes.
        connection = _connect(path, "mode=ro&immutable=1")
    return connection


def _connect(path: Path, parameters: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?{parameters}",
        uri=True,
        timeout=_BUSY_TIMEOUT_S,
        isolation_level=None,  # transactions are written out
        check_same_thread=False,
    )

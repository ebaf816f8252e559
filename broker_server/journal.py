"""The journal of a run: append-only, durable, the only truth of the server.

`append` returns after the entries are on disk, all or none. Whatever the server does in the outside world follows it,
so a kill at any point loses nothing that anybody was told about.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote

from ..protocol.errors import ArtifactError, ConfigError, FedzoError
from .entry import KINDS, Entry

if TYPE_CHECKING:
    from typing_extensions import Self  # typing.Self came with Python 3.11

__all__ = ["KINDS", "DuplicateEntry", "Entry", "Journal", "MemoryJournal", "SqliteJournal"]

_APPLICATION_ID = 0x66647A6A  # "fdzj"
_PAGE_ENTRIES = 256
_BUSY_TIMEOUT_S = 10.0

# A report must not count twice, whatever goes wrong above: (round, device) is its key. The triggers keep even a
# careless `sqlite3` session from rewriting history.
_SCHEMA_1 = (
    """CREATE TABLE entry (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        kind TEXT NOT NULL,
        round INTEGER NOT NULL,
        device TEXT NOT NULL,
        payload BLOB NOT NULL,
        at REAL NOT NULL
    )""",
    "CREATE INDEX entry_by_kind ON entry (kind, sequence)",
    "CREATE UNIQUE INDEX one_report_per_round_and_device ON entry (round, device) WHERE kind = 'report'",
    "CREATE TRIGGER entries_stay_as_they_are BEFORE UPDATE ON entry BEGIN SELECT RAISE(ABORT, 'append only'); END",
    "CREATE TRIGGER entries_stay BEFORE DELETE ON entry BEGIN SELECT RAISE(ABORT, 'append only'); END",
)


def _create_version_1(connection: sqlite3.Connection) -> None:
    for statement in _SCHEMA_1:
        connection.execute(statement)


# Step n turns a file of schema version n into one of version n + 1; an empty file is version 0.
_MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_create_version_1,)


class DuplicateEntry(FedzoError):  # noqa: N818 (named for what it is)
    """A report of this round and device is in the journal already; nothing of the call was stored."""


class Journal(Protocol):
    """The seam between the server and its memory. Safe to use from any thread."""

    def append(self, entries: Sequence[Entry]) -> list[int]:
        """Store all entries or none, and return their sequence numbers, which ascend.

        Raises:
            DuplicateEntry: A second report for the same round and device.
            FedzoError: The journal cannot be written (disk full, input or output error).
        """

    def read(self, kinds: Collection[str] | None = None, from_sequence: int = 0) -> Iterator[tuple[int, Entry]]:
        """Yield ``(sequence, entry)`` in order, from a sequence number on, of some kinds or all."""

    def get(self, sequence: int) -> Entry:
        """Return one entry.

        Raises:
            KeyError: There is none.
        """

    @property
    def last_sequence(self) -> int:
        """Sequence number of the newest entry, 0 when empty."""

    def close(self) -> None:
        """Free it. Idempotent."""


class MemoryJournal:
    """A journal for tests and simulations: as strict as the real one, but gone with the process."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
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
                        raise _duplicate(entries)
                    added.add(key)
            self._reports |= added
            first = len(self._entries) + 1
            self._entries += entries
            return list(range(first, len(self._entries) + 1))

    def read(self, kinds: Collection[str] | None = None, from_sequence: int = 0) -> Iterator[tuple[int, Entry]]:
        """See `Journal.read`."""
        _check_kinds(kinds)
        return self._read(kinds, max(0, from_sequence - 1))

    def _read(self, kinds: Collection[str] | None, position: int) -> Iterator[tuple[int, Entry]]:
        while position < len(self._entries):
            entry = self._entries[position]
            position += 1
            if kinds is None or entry.kind in kinds:
                yield position, entry

    def get(self, sequence: int) -> Entry:
        """See `Journal.get`."""
        if not 1 <= sequence <= len(self._entries):
            raise KeyError(sequence)
        return self._entries[sequence - 1]

    @property
    def last_sequence(self) -> int:
        """See `Journal.last_sequence`."""
        return len(self._entries)

    def close(self) -> None:
        """See `Journal.close`."""


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
        if read_only and not path.is_file():
            raise ConfigError(f"there is no journal {path}", hint="check the path of the run")
        try:
            if not read_only:
                self._guard = _lock(path)
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            with self._explained():
                self._connection = _open(path, read_only=read_only)
                _check_file(self._connection, path, read_only=read_only)
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
        rows = [(entry.kind, entry.round, entry.device, entry.payload, entry.at) for entry in entries]
        with self._lock, self._explained():
            connection = self._open_connection
            try:
                connection.execute("BEGIN IMMEDIATE")
                insert = "INSERT INTO entry (kind, round, device, payload, at) VALUES (?, ?, ?, ?, ?)"
                sequences = [connection.execute(insert, row).lastrowid or 0 for row in rows]
                connection.execute("COMMIT")
            except BaseException as error:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.IntegrityError) and "UNIQUE" in str(error):
                    raise _duplicate(entries) from None
                raise
        return sequences

    def read(self, kinds: Collection[str] | None = None, from_sequence: int = 0) -> Iterator[tuple[int, Entry]]:
        """See `Journal.read`; holds a page of 256 entries, and sees what is appended meanwhile."""
        _check_kinds(kinds)
        return self._read(kinds, from_sequence)

    def _read(self, kinds: Collection[str] | None, next_sequence: int) -> Iterator[tuple[int, Entry]]:
        wanted = sorted(kinds) if kinds is not None else sorted(KINDS)
        where = f"kind IN ({', '.join('?' * len(wanted))}) AND " if kinds is not None else ""
        query = f"SELECT sequence, kind, round, device, payload, at FROM entry WHERE {where}sequence >= ? ORDER BY sequence LIMIT ?"  # noqa: E501, S608
        while True:
            with self._lock, self._explained():
                values = [*(wanted if kinds is not None else ()), next_sequence, _PAGE_ENTRIES]
                page = self._open_connection.execute(query, values).fetchall()
            for sequence, *columns in page:
                yield sequence, self._entry(sequence, columns)
            if len(page) < _PAGE_ENTRIES:
                return
            next_sequence = page[-1][0] + 1

    def get(self, sequence: int) -> Entry:
        """See `Journal.get`."""
        query = "SELECT kind, round, device, payload, at FROM entry WHERE sequence = ?"
        with self._lock, self._explained():
            row = self._open_connection.execute(query, (sequence,)).fetchone()
        if row is None:
            raise KeyError(sequence)
        return self._entry(sequence, row)

    @property
    def last_sequence(self) -> int:
        """See `Journal.last_sequence`."""
        with self._lock, self._explained():
            row = self._open_connection.execute("SELECT max(sequence) FROM entry").fetchone()
        return int(row[0] or 0)

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

    @property
    def _open_connection(self) -> sqlite3.Connection:
        if self._connection is None:
            raise FedzoError(f"the journal {self._path} is closed")
        return self._connection

    def _entry(self, sequence: int, columns: Sequence[object]) -> Entry:
        try:
            return Entry(*columns)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise _damaged(self._path, f"entry {sequence}: {error}") from None

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
                raise _damaged(self._path, text) from error
            raise FedzoError(f"the journal {self._path} cannot be used: {text}", hint="check the disk") from error
        except sqlite3.DatabaseError as error:
            raise _damaged(self._path, str(error)) from error


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


def _check_file(connection: sqlite3.Connection, path: Path, *, read_only: bool) -> None:
    """Check that the file is a healthy journal, before the first write, then bring it to the newest schema."""

    def number(pragma: str) -> int:
        return int(connection.execute(f"PRAGMA {pragma}").fetchone()[0])

    version, application = number("user_version"), number("application_id")
    problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise _damaged(path, str(problem))
    is_new = version == 0 and application == 0 and number("page_count") <= 1 and not read_only
    if application != _APPLICATION_ID and not is_new:
        raise ArtifactError(f"{path} is an SQLite file, but no journal of fedzo", hint="check the path of the run")
    if version > len(_MIGRATIONS):
        raise ArtifactError(
            f"the journal {path} has schema version {version}; this fedzo knows up to {len(_MIGRATIONS)}",
            hint="update fedzo",
        )
    if version < len(_MIGRATIONS) and read_only:
        raise ArtifactError(f"the journal {path} has the old schema version {version}", hint="start the server once")
    if read_only:
        return
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # sync the log at every commit; NORMAL may lose the last ones
    for step in range(version, len(_MIGRATIONS)):
        connection.execute("BEGIN EXCLUSIVE")
        _MIGRATIONS[step](connection)
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {step + 1}")
        connection.execute("COMMIT")


def _check_kinds(kinds: Collection[str] | None) -> None:
    unknown = set(kinds or ()) - KINDS
    if unknown:
        raise ValueError(f"{min(unknown)!r} is no kind of entry; known are {sorted(KINDS)}")


def _duplicate(entries: Sequence[Entry]) -> DuplicateEntry:
    names = ", ".join(f"({entry.round}, {entry.device!r})" for entry in entries if entry.kind == "report")
    return DuplicateEntry(f"one of the reports (round, device) {names[:200]} is in the journal already")


def _damaged(path: Path, problem: str) -> ArtifactError:
    hint = "put a copy of the file back, or recover it with: sqlite3 FILE .recover"
    return ArtifactError(f"the journal {path} is damaged: {problem.splitlines()[0]}", hint=hint)

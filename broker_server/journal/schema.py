"""The schema of the journal's file, and how older files become new ones."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

from ...protocol.errors import ArtifactError

__all__ = ["MIGRATIONS", "check_file", "check_pages", "damaged"]

APPLICATION_ID = 0x66647A6A  # "fdzj"
OLDEST_READABLE = 1
"""Since then versions differ in indices and triggers only: a reader takes them as they are, without migrating."""
FULL_CHECK_BYTES = 32 << 20
"""Larger files are not read through at every start: a restart would take longer the longer the run has lasted."""

# A report must not count twice, whatever goes wrong above: (round, device) is its key. The triggers keep even a
# careless `sqlite3` session from rewriting history.
_VERSION_1 = (
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

# Nearly all entries are reports, which are read by round or all of them: the other indices do without, which makes
# appending them cheaper. Snapshots are the one thing that follows from the rest, so old ones may go.
_VERSION_2 = (
    "DROP INDEX entry_by_kind",
    "CREATE INDEX entry_by_kind ON entry (kind, sequence) WHERE kind <> 'report'",
    "CREATE INDEX entry_by_round ON entry (round, sequence) WHERE kind <> 'report'",
    "DROP TRIGGER entries_stay",
    """CREATE TRIGGER entries_stay BEFORE DELETE ON entry WHEN OLD.kind <> 'snapshot'
        BEGIN SELECT RAISE(ABORT, 'append only'); END""",
)


def _statements(*statements: str) -> Callable[[sqlite3.Connection], None]:
    def execute(connection: sqlite3.Connection) -> None:
        for statement in statements:
            connection.execute(statement)

    return execute


MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_statements(*_VERSION_1), _statements(*_VERSION_2))
"""Step n turns a file of schema version n into one of version n + 1; an empty file is version 0."""


def check_file(connection: sqlite3.Connection, path: Path, *, read_only: bool) -> None:
    """Check that the file is a healthy journal, before the first write, then bring it to the newest schema.

    Raises:
        ArtifactError: It is damaged, no journal, or of another version that cannot be used.
        sqlite3.DatabaseError: SQLite cannot read it.
    """

    def number(pragma: str) -> int:
        return int(connection.execute(f"PRAGMA {pragma}").fetchone()[0])

    version, application = number("user_version"), number("application_id")
    if number("page_count") * number("page_size") <= FULL_CHECK_BYTES:
        check_pages(connection, path)
    is_new = version == 0 and application == 0 and number("page_count") <= 1
    if is_new and read_only:
        raise unbegun(path)
    if application != APPLICATION_ID and not is_new:
        raise ArtifactError(f"{path} is an SQLite file, but no journal of fedzo", hint="check the path of the run")
    if version > len(MIGRATIONS):
        raise ArtifactError(
            f"the journal {path} has schema version {version}; this fedzo knows up to {len(MIGRATIONS)}",
            hint="update fedzo",
        )
    if version < OLDEST_READABLE and read_only:
        raise ArtifactError(
            f"the journal {path} has the old schema version {version}",
            hint="read it with the fedzo that wrote it",
        )
    if read_only:
        return
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # sync the log at every commit; NORMAL may lose the last ones
    for step in range(version, len(MIGRATIONS)):
        connection.execute("BEGIN EXCLUSIVE")
        MIGRATIONS[step](connection)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {step + 1}")
        connection.execute("COMMIT")


def check_pages(connection: sqlite3.Connection, path: Path) -> None:
    """Read the whole file.

    Raises:
        ArtifactError: It is damaged.
        sqlite3.DatabaseError: SQLite cannot read it.
    """
    problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise damaged(path, str(problem))


def unbegun(path: Path) -> ArtifactError:
    """The error for a journal that nothing was written to yet: at most for a moment, unless its server was killed."""
    return ArtifactError(
        f"the journal {path} is empty: it has 0 entries, and a run that has begun has at least 1",
        hint="if its server is just starting, look again in a moment; if that was killed, begin the run again: "
        f"fedzo serve ARTIFACT --run {path.parent.name}",
    )


def damaged(path: Path, problem: str) -> ArtifactError:
    """The error for a file that cannot be trusted."""
    hint = "put a copy of the file back, or recover it with: sqlite3 FILE .recover"
    return ArtifactError(f"the journal {path} is damaged: {problem.splitlines()[0]}", hint=hint)

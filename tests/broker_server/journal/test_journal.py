"""One contract for both journals, and what only the file has to survive."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzo.broker_server.journal import (
    KINDS,
    DuplicateEntry,
    Entry,
    Journal,
    MemoryJournal,
    SqliteJournal,
    Tally,
    schema,
)
from fedzo.protocol.errors import ArtifactError, ConfigError, FedzoError
from fedzo.protocol.server_side.coordinator_events import RecordKind


@pytest.fixture(params=["memory", "sqlite"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Journal]:
    made: Journal = MemoryJournal() if request.param == "memory" else SqliteJournal(tmp_path / "journal.sqlite")
    yield made
    made.close()


def report(round_: int = 1, device: str = "dev-1", payload: bytes = b"scalars") -> Entry:
    return Entry("report", round_, device, payload, 1e9)


def phase(payload: bytes = b"training") -> Entry:
    return Entry("phase", 0, "", payload, 1e9 + 0.25)


# ---------------------------------------------------------------------- the contract


def test_entries_come_back_in_order_as_they_went_in(journal: Journal) -> None:
    assert journal.last_sequence == 0
    assert list(journal.read()) == []
    entries = [Entry(kind, n, f"dev-{n}", bytes([n]) * n, 1.5 * n) for n, kind in enumerate(sorted(KINDS))]  # type: ignore[arg-type]
    assert journal.append(entries[:4]) == [1, 2, 3, 4]
    assert journal.append(entries[4:]) == list(range(5, len(entries) + 1))
    assert journal.append([]) == []
    assert list(journal.read()) == list(enumerate(entries, start=1))
    assert journal.last_sequence == len(entries)
    assert journal.get(3) == entries[2]


@pytest.mark.parametrize("sequence", [0, 2, -1])
def test_a_sequence_that_is_not_there(journal: Journal, sequence: int) -> None:
    journal.append([phase()])
    with pytest.raises(KeyError):
        journal.get(sequence)


@pytest.mark.parametrize(
    ("kinds", "from_sequence", "expected"),
    [
        (None, 0, [1, 2, 3, 4, 5]),
        (None, 3, [3, 4, 5]),
        (None, 6, []),
        ({"report"}, 0, [2, 4]),
        ({"report", "update"}, 3, [4, 5]),
        ({"mask"}, 0, []),
        (set(), 0, []),
    ],
)
def test_reading_some(journal: Journal, kinds: set[str] | None, from_sequence: int, expected: list[int]) -> None:
    update = Entry("update", 1, "", b"record", 0.0)
    journal.append([phase(), report(1), phase(), report(2), update])
    assert [sequence for sequence, _ in journal.read(kinds, from_sequence)] == expected


def test_reading_an_unknown_kind_is_a_mistake(journal: Journal) -> None:
    with pytest.raises(ValueError, match="reports"):
        journal.read({"reports"})


@pytest.mark.parametrize(
    ("kinds", "from_sequence", "round_", "expected"),
    [
        (None, 0, 1, [1, 2, 4, 5]),
        (None, 3, 1, [4, 5]),
        ({"report"}, 0, 1, [1, 4]),
        ({"report"}, 2, 2, [7]),
        ({"refusal", "update"}, 0, 1, [2, 5]),
        ({"report", "update"}, 0, 1, [1, 4, 5]),
        ({"mask"}, 0, 1, []),
        (None, 0, 9, []),
    ],
)
def test_reading_a_round(
    journal: Journal, kinds: set[str] | None, from_sequence: int, round_: int, expected: list[int]
) -> None:
    refusal, update = Entry("refusal", 1, "dev-2", b"no", 0.0), Entry("update", 1, "", b"record", 0.0)
    journal.append([report(1), refusal, phase(), report(1, "dev-3"), update, Entry("announce", 2, "", b"", 0.0)])
    journal.append([report(2)])
    assert [sequence for sequence, _ in journal.read(kinds, from_sequence, round_=round_)] == expected


def test_where_the_entries_of_a_kind_are(journal: Journal) -> None:
    journal.append([phase(), report(1), report(2), phase()])
    assert [journal.sequences(kind) for kind in ("phase", "report", "mask")] == [[1, 4], [2, 3], []]
    with pytest.raises(ValueError, match="reports"):
        journal.sequences("reports")
    assert journal.count_before("report", [1, 2, 3, 4, 9]) == [0, 0, 1, 2, 2]
    assert journal.count_before("phase", [2]) == [1]
    assert journal.count_before("mask", [9]) == [0]
    assert journal.count_before("report", []) == []


def test_what_there_is_is_added_up(journal: Journal) -> None:
    assert journal.tally() == []
    journal.append([Entry("announce", 1, "", b"head", 5.0), report(1), report(1, "dev-2", b"more"), phase()])
    journal.append([Entry("report", 1, "dev-3", b"", 2e9), report(2)])
    assert journal.tally() == [
        Tally(0, "phase", 1, 8, 1e9 + 0.25, 1e9 + 0.25),
        Tally(1, "announce", 1, 4, 5.0, 5.0),
        Tally(1, "report", 3, 11, 1e9, 2e9),
        Tally(2, "report", 1, 7, 1e9, 1e9),
    ]


def snapshot(round_: int) -> Entry:
    return Entry("snapshot", round_, "", bytes([round_]) * 5000, 0.0)


def test_only_old_snapshots_ever_go(journal: Journal) -> None:
    journal.drop_snapshots()
    journal.append([snapshot(1), report(1), snapshot(2), phase(), snapshot(3)])
    for keep in (0, -1):
        with pytest.raises(ValueError, match="1 or more"):
            journal.drop_snapshots(keep)
    journal.drop_snapshots(2)
    journal.drop_snapshots(2)
    assert [sequence for sequence, _ in journal.read()] == [2, 3, 4, 5]
    with pytest.raises(KeyError):
        journal.get(1)
    journal.drop_snapshots()
    assert list(journal.read({"snapshot"})) == [(5, snapshot(3))]
    assert [sequence for sequence, _ in journal.read({"snapshot", "report"}, 1, round_=1)] == [2]
    assert journal.last_sequence == 5
    assert journal.append([phase()]) == [6]


def test_many_entries_are_read_across_pages(journal: Journal) -> None:
    journal.append([report(n) for n in range(600)])
    assert [entry.round for _, entry in journal.read()] == list(range(600))
    assert [entry.round for _, entry in journal.read({"report"}, 257)] == list(range(256, 600))


def test_what_is_appended_while_reading_is_seen(journal: Journal) -> None:
    journal.append([report(n) for n in range(300)])
    seen = []
    for sequence, _ in journal.read():
        seen.append(sequence)
        if sequence == 10:
            journal.append([phase()])
    assert seen == list(range(1, 302))


@pytest.mark.parametrize(
    "batch",
    [
        [report()],
        [phase(), report()],
        [report(7), report(7)],  # within one call
        [report(8, payload=b"first"), phase(), report(8, payload=b"second")],
    ],
)
def test_a_report_counts_once_and_a_failed_call_stores_nothing(journal: Journal, batch: list[Entry]) -> None:
    journal.append([report()])
    with pytest.raises(DuplicateEntry, match="already"):
        journal.append(batch)
    assert [entry for _, entry in journal.read()] == [report()]
    assert journal.append([report(7), report(8), report(1, "dev-2")])  # the failed call left no trace


def test_only_reports_are_unique(journal: Journal) -> None:
    journal.append(
        [phase(), phase(), Entry("refusal", 1, "dev-1", b"late", 0.0), Entry("refusal", 1, "dev-1", b"", 0.0)]
    )
    assert journal.last_sequence == 4


def test_threads_may_share_a_journal(journal: Journal) -> None:
    def work(device: int) -> None:
        for round_ in range(20):
            journal.append([report(round_, f"dev-{device}"), phase()])
            list(journal.read({"report"}, journal.last_sequence - 1))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sequences = [sequence for sequence, _ in journal.read()]
    assert sequences == list(range(1, 161))
    # The entries of one call lie together.
    entries = [entry.kind for _, entry in journal.read()]
    assert entries[::2] == ["report"] * 80


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"kind": "rumour"}, ValueError),
        ({"round": -1}, ValueError),
        ({"round": 1 << 63}, ValueError),
        ({"payload": bytearray(b"x")}, TypeError),
        ({"device": b"dev"}, TypeError),
        ({"at": float("nan")}, ValueError),
    ],
)
def test_an_entry_checks_itself(change: dict[str, object], error: type[Exception]) -> None:
    fields: dict[str, object] = {"kind": "report", "round": 1, "device": "d", "payload": b"", "at": 0.0}
    with pytest.raises(error):
        Entry(**(fields | change))  # type: ignore[arg-type]


ENTRIES = st.builds(
    Entry,
    kind=st.sampled_from(sorted(KINDS)),
    round=st.integers(0, (1 << 63) - 1),
    device=st.text(st.characters(codec="utf-8"), max_size=48),
    payload=st.binary(max_size=300),
    at=st.floats(allow_nan=False, allow_infinity=False),
)
A_KIND = st.sampled_from(sorted(KINDS))


@settings(max_examples=60, deadline=None)
@given(calls=st.lists(st.lists(ENTRIES, max_size=6) | st.integers(1, 2), max_size=6), kinds=st.sets(A_KIND))
def test_both_journals_do_the_same(
    calls: list[list[Entry] | int], kinds: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A number in place of entries is how many snapshots are kept."""
    memory = MemoryJournal()
    with SqliteJournal(tmp_path_factory.mktemp("journal") / "j") as file:
        for call in calls:
            if isinstance(call, int):
                memory.drop_snapshots(call)
                file.drop_snapshots(call)
                continue
            try:
                expected: list[int] | None = memory.append(call)
            except DuplicateEntry:
                expected = None
            if expected is None:
                with pytest.raises(DuplicateEntry):
                    file.append(call)
            else:
                assert file.append(call) == expected
        assert list(file.read()) == list(memory.read())
        assert list(file.read(kinds)) == list(memory.read(kinds))
        assert file.tally() == memory.tally()
        rounds = {entry.round for _, entry in memory.read()}
        for round_ in rounds:
            assert list(file.read(kinds, round_=round_)) == list(memory.read(kinds, round_=round_))


# ---------------------------------------------------------------------- the file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


def test_a_journal_outlives_its_process(path: Path) -> None:
    with SqliteJournal(path) as journal:
        journal.append([report(), phase()])
    with SqliteJournal(path) as journal:
        assert [entry for _, entry in journal.read()] == [report(), phase()]
        assert journal.append([report(2)]) == [3]
    journal.close()
    with pytest.raises(FedzoError, match="closed"):
        journal.append([phase()])


def test_only_the_owner_may_read_it(path: Path) -> None:
    before = os.umask(0)
    try:
        with SqliteJournal(path) as journal:
            journal.append([phase()])
            files = list(path.parent.iterdir())
            assert len(files) == 4  # journal, lock, write-ahead log and its index
            assert [file.stat().st_mode & 0o777 for file in files] == [0o600] * 4
    finally:
        os.umask(before)


def test_every_commit_is_synced(path: Path) -> None:
    with SqliteJournal(path) as journal:
        connection = journal._open_connection
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_second_server_is_refused_and_a_reader_is_not(path: Path) -> None:
    with SqliteJournal(path) as journal:
        journal.append([phase()])
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}") as caught:
            SqliteJournal(path)
        assert str(path) in caught.value.message
        assert caught.value.exit_code == 3
        with SqliteJournal(path, read_only=True) as reader:
            journal.append([report()])
            assert reader.last_sequence == 2
            assert [entry for _, entry in reader.read({"report"})] == [report()]
            with pytest.raises(FedzoError, match="readonly"):
                reader.append([phase()])
        journal.append([report(2)])
    SqliteJournal(path).close()


def test_a_reader_may_stay_when_the_server_goes(path: Path) -> None:
    journal = SqliteJournal(path)
    journal.append([report()])
    with SqliteJournal(path, read_only=True) as reader:
        journal.close()
        assert reader.last_sequence == 1
        with SqliteJournal(path) as again:
            again.append([report(2)])
            assert reader.last_sequence == 2


def test_a_reader_does_not_keep_a_server_out(path: Path) -> None:
    with SqliteJournal(path) as journal:
        journal.append([report()])
    with SqliteJournal(path, read_only=True) as reader:
        assert reader.last_sequence == 1
        with SqliteJournal(path) as journal:
            journal.append([report(2)])
    with SqliteJournal(path) as journal:
        assert journal.last_sequence == 2


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root ignores modes; needs setpriv")
def test_a_copy_on_read_only_media_can_be_read(path: Path) -> None:
    with SqliteJournal(path) as journal:
        journal.append([report()])
    path.chmod(0o444)
    path.parent.chmod(0o555)
    script = (
        "import sys; from pathlib import Path; from fedzo.broker_server.journal import SqliteJournal\n"
        "print(SqliteJournal(Path(sys.argv[1]), read_only=True).last_sequence)"
    )
    command = [sys.executable, "-c", script, str(path)]
    if os.geteuid() == 0:
        for parent in [path.parent.parent, path.parent.parent.parent]:
            parent.chmod(0o755)
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]
        if subprocess.run([*nobody, sys.executable, "-c", "import fedzo.broker_server.journal"]).returncode:
            pytest.skip("another user than root cannot run this interpreter")
        command = nobody + command
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.stdout == "1\n", done.stderr
    finally:
        path.parent.chmod(0o755)


def test_history_cannot_be_rewritten(path: Path) -> None:
    with SqliteJournal(path) as journal:
        journal.append([report()])
        for statement in ("UPDATE entry SET round = 2", "DELETE FROM entry"):
            with pytest.raises(sqlite3.IntegrityError, match="append only"):
                journal._open_connection.execute(statement)


def test_a_missing_journal_or_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no journal"):
        SqliteJournal(tmp_path / "none", read_only=True)
    with pytest.raises(ConfigError, match="No such file or directory"):
        SqliteJournal(tmp_path / "none" / "journal")
    with pytest.raises(ConfigError, match="directory"):
        SqliteJournal(tmp_path)


def _scribble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:] = bytes(random.Random(0).randrange(256) for _ in range(len(data) - 4096))
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2 + 100)


def _other_text(path: Path) -> None:
    path.write_text("this is a letter, not a database\n" * 200)


def _other_database(path: Path) -> None:
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE bookmarks (url TEXT)")
    connection.commit()
    connection.close()


def _newer(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_scribble, "damaged"),
        (_truncate, "damaged"),
        (_other_text, "damaged: file is not a database"),
        (_other_database, "no journal of fedzo"),
        (_newer, "schema version 99"),
    ],
)
def test_a_file_that_is_no_healthy_journal(
    path: Path, harm: Callable[[Path], None], words: str, read_only: bool
) -> None:
    with SqliteJournal(path) as journal:
        journal.append([report(n, payload=bytes(2000)) for n in range(50)])
    harm(path)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=words) as caught:
        SqliteJournal(path, read_only=read_only)
    assert caught.value.hint
    assert path.read_bytes() == before, "a damaged file was changed"
    with pytest.raises(ArtifactError):  # and the lock was given back
        SqliteJournal(path, read_only=read_only)


@pytest.mark.parametrize("kinds", [None, {"report"}])
def test_entries_out_of_order_end_the_reading(
    path: Path, kinds: set[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SqliteJournal(path) as journal:
        journal.append([report(n) for n in range(20)])
        monkeypatch.setattr(journal, "_rows", lambda *_: [(5, "report", 5, "dev-1", b"", 0.0)])
        with pytest.raises(ArtifactError, match="damaged: entry 5 comes where entry 10"):
            list(journal.read(kinds, 10))


def test_a_full_disk_stores_nothing_and_says_so(path: Path) -> None:
    with SqliteJournal(path) as journal:
        journal.append([report()])
        pages = journal._open_connection.execute("PRAGMA page_count").fetchone()[0]
        journal._open_connection.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(FedzoError, match="no space left") as caught:
            journal.append([phase(), report(2, payload=bytes(100_000))])
        assert "free some space" in caught.value.hint
        assert journal.last_sequence == 1
        journal._open_connection.execute("PRAGMA max_page_count = 1000000")
        assert journal.append([report(2, payload=bytes(100_000))]) == [2]


def test_an_old_schema_is_brought_up_to_date(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SqliteJournal(path) as journal:
        journal.append([report()])

    def add_column(connection: sqlite3.Connection) -> None:
        connection.execute("ALTER TABLE entry ADD COLUMN note TEXT NOT NULL DEFAULT ''")

    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, add_column))
    monkeypatch.setattr(schema, "OLDEST_READABLE", 3)
    with pytest.raises(ArtifactError, match="old schema version 2"):
        SqliteJournal(path, read_only=True)
    with SqliteJournal(path) as journal:
        assert [entry for _, entry in journal.read()] == [report()]
        assert journal._open_connection.execute("PRAGMA user_version").fetchone() == (3,)


def test_a_copy_of_a_journal_that_is_written(path: Path) -> None:
    """What the pages name for it: one transaction of a reader, which commits meanwhile neither stop nor change."""
    with SqliteJournal(path) as journal:
        journal.append([report(n, payload=bytes(3000)) for n in range(100)])
        reader = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
        calls = []

        def commit() -> int:
            calls.append(journal.append([phase()]))
            return 0

        reader.set_progress_handler(commit, 50)
        reader.execute("VACUUM INTO ?", (str(path.with_name("copy")),))
        reader.close()
        assert calls
        with SqliteJournal(path.with_name("copy")) as restored:
            kept = [entry for _, entry in restored.read()]
            assert restored.append([report(200)])
        assert kept == [entry for _, entry in journal.read()][: len(kept)]
        assert len(kept) >= 100


def test_the_page_names_every_kind() -> None:
    text = (Path(__file__).parents[3] / "docs" / "journal.md").read_text(encoding="utf-8")
    table = text[text.index("| kind |") :].split("\n\n")[0].splitlines()[2:]
    assert [row.split("|")[1].strip().strip("`") for row in table] == list(get_args(RecordKind))


@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_of_the_first_version(path: Path, read_only: bool) -> None:
    """Written by an earlier fedzo: every entry stays, and the new schema's rules hold from then on."""
    connection = sqlite3.connect(path)
    schema.MIGRATIONS[0](connection)
    old = [report(1), snapshot(1), Entry("update", 1, "", b"record", 3.0), snapshot(2)]
    rows = [(entry.kind, entry.round, entry.device, entry.payload, entry.at) for entry in old]
    connection.executemany("INSERT INTO entry (kind, round, device, payload, at) VALUES (?, ?, ?, ?, ?)", rows)
    connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()
    if read_only:
        before = path.read_bytes()
        with SqliteJournal(path, read_only=True) as journal:
            assert [entry for _, entry in journal.read()] == old
            assert [entry for _, entry in journal.read({"update", "snapshot"})] == old[1:]
            assert [entry for _, entry in journal.read(round_=1)] == old[:3]
        assert path.read_bytes() == before
        return
    with SqliteJournal(path) as journal:
        assert [entry for _, entry in journal.read()] == old
        with pytest.raises(DuplicateEntry):
            journal.append([report(1)])
        journal.drop_snapshots()
        assert journal.append([report(2)]) == [5]
        assert [entry for _, entry in journal.read()] == [old[0], *old[2:], report(2)]
        with pytest.raises(sqlite3.IntegrityError, match="append only"):
            journal._open_connection.execute("DELETE FROM entry WHERE kind = 'update'")
    with SqliteJournal(path, read_only=True) as journal:
        assert journal._open_connection.execute("PRAGMA user_version").fetchone() == (2,)


def test_a_large_file_is_read_through_when_asked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening reads small files whole; of others it sees what it touches."""
    with SqliteJournal(path) as journal:
        journal.append([report(n, payload=bytes(2000)) for n in range(500)])
        journal.check()
    data = bytearray(path.read_bytes())
    middle = len(data) // 8192 * 4096
    data[middle : middle + 4096] = b"\x5a" * 4096
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged"):
        SqliteJournal(path)
    monkeypatch.setattr(schema, "FULL_CHECK_BYTES", 1 << 16)
    with SqliteJournal(path) as journal:
        with pytest.raises(ArtifactError, match="damaged"):
            journal.check()
        with pytest.raises(ArtifactError, match="damaged"):
            list(journal.read())


WRITER = """
import sys
from pathlib import Path
from fedzo.broker_server.journal import Entry, SqliteJournal

journal = SqliteJournal(Path(sys.argv[1]))
number = journal.last_sequence
while True:
    batch = [Entry("report", number + n, "dev", str(number + n).encode() * 50, 0.0) for n in range(1 + number % 3)]
    for sequence in journal.append(batch):
        print(sequence, flush=True)
    number = journal.last_sequence
"""


def test_nothing_that_was_reported_is_lost_by_kill_9(path: Path) -> None:
    dice = random.Random(7)
    printed = 0
    for _ in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            assert writer.stderr is not None
            lines = [writer.stdout.readline() for _ in range(dice.randrange(5, 40))]
            assert lines[0], writer.stderr.read()
            time.sleep(dice.uniform(0.0, 0.01))
            writer.send_signal(signal.SIGKILL)
            lines += [line for line in writer.stdout if line.endswith("\n")]
        numbers = [int(line) for line in lines]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert numbers[0] > printed
        printed = numbers[-1]
        with SqliteJournal(path) as journal:  # the lock died with its holder
            stored = list(journal.read())
        assert [sequence for sequence, _ in stored] == list(range(1, len(stored) + 1))
        assert len(stored) >= printed, "an entry whose number was printed is gone"
        for sequence, entry in stored:
            assert entry == Entry("report", entry.round, "dev", str(entry.round).encode() * 50, 0.0)
            assert entry.round == sequence - 1

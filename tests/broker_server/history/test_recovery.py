"""A server goes on from the newest snapshot as it would from the whole journal."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fedzo.broker_server.history.recovery import entries_to_resume, keep_last_snapshot, resume
from fedzo.broker_server.journal import Entry, MemoryJournal
from fedzo.protocol.errors import ProtocolError
from fedzo.protocol.server_side import snapshots
from fedzo.protocol.server_side.snapshots import Snapshot, SnapshotClock
from fedzo.protocol.wire.messages import UpdateRecord
from fedzo.protocol.wire.topics import Channel
from tests.protocol.server_side.test_coordinator_restart import SPARSE, VARIANTS, outcome
from tests.protocol.simulation.desk import NAMES, Desk, change

STRIDE = 7


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    """A snapshot after every update."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots, "MOST_UPDATES", 1)
        yield


@functools.cache
def undisturbed(variant: str) -> Desk:
    """Only to be called under the fixture."""
    return Desk(change(SPARSE, **VARIANTS[variant])).connect().join().play()


def journal_of(entries: list[Any]) -> MemoryJournal:
    journal = MemoryJournal()
    for number, entry in enumerate(entries):
        journal.append([Entry(entry[0], entry[1], entry[2], entry[3], float(number))])
        keep_last_snapshot(journal, {entry[0]})
    return journal


def resumed(whole: Desk, cut: int, entries: list[Any] | None = None) -> Desk:
    """A new server that has read what it needs of the first entries."""
    entries = (whole.journal if entries is None else entries)[:cut]
    desk = Desk(whole.settings)
    desk.machine, desk.trace = resume(lambda: Desk(whole.settings).machine, journal_of(entries))
    desk.journal = entries
    return desk


def state(desk: Desk) -> dict[str, Any]:
    """All that a restart has to find out."""
    machine = desk.machine
    progress = machine._progress
    return {
        "head": machine.head,
        "replica": machine.replica.snapshot(),
        "mask": machine.mask,
        "progress": progress.state(),
        "arrays": progress.state_arrays(),
        "evaluations": machine.evaluations,
        "roster": machine.roster.state(),
        "open": machine._round is None or sorted(machine._round.reports),
        "finished": machine.finished,
        "late": (machine._late.state(), [(device, late.round) for _, device, late in machine._late._waiting]),
        "clock": vars(machine._clock),
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_newest_snapshot_gives_the_state_of_the_whole_journal(variant: str) -> None:
    whole = undisturbed(variant)
    assert whole.kinds().count("snapshot") == whole.machine.replica.index
    first = whole.kinds().index("snapshot")
    for cut in range(1, len(whole.journal) + 1, max(1, len(whole.journal) // 20)):
        assert state(resumed(whole, cut)) == state(Desk(whole.settings, journal=whole.journal[:cut])), cut
        if cut > first:
            journal = journal_of(whole.journal[:cut])
            entries = [kind for kind, *_ in entries_to_resume(journal, *journal.sequences("snapshot"))]
            assert entries.count("update") <= 1
            assert entries.count("mask") <= 1
            assert entries.count("report") <= 2 * len(NAMES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_restart_from_a_snapshot_leads_to_the_same_end(variant: str) -> None:
    whole = undisturbed(variant)
    for cut in range(whole.kinds().index("snapshot") + 1, len(whole.journal), STRIDE):
        desk = resumed(whole, cut)
        desk.connect().join().play()
        assert outcome(desk) == outcome(whole), cut


def test_late_reports_count_after_a_restart_too() -> None:
    """Every round has one report that comes after its end; the snapshot in between knows what it was about."""
    settings = change(SPARSE, sparsity=0.0, evaluate_every=0, rounds=8, staleness=2, quorum=2, close_at=3)
    whole = Desk(settings).connect().join()
    for number in range(8):
        late = NAMES[number % 4]
        report = whole.measure(late)
        whole.report(*(name for name in NAMES if name != late))
        if whole.head.phase == "train":
            whole.say(late, report, Channel.REPORT)
    kinds = whole.kinds()
    assert kinds.count("report") > 8 * 3
    assert any(entry[0] == "update" and UpdateRecord.decode(entry[3]).ages for entry in whole.journal)
    for cut in range(kinds.index("snapshot"), len(whole.journal) + 1):
        found, expected = state(resumed(whole, cut)), state(Desk(settings, journal=whole.journal[:cut]))
        for one in (found, expected):  # A snapshot also knows who was there and had not reported yet.
            del one["roster"]["status"], one["roster"]["micro_batch"]
        assert found == expected, cut


def test_devices_that_enrol_after_a_snapshot_get_the_next_numbers() -> None:
    desk = Desk(change(SPARSE, rounds=4)).connect().join()
    while "snapshot" not in desk.kinds():
        desk.report()
    desk.join("e")
    again = resumed(desk, len(desk.journal))
    assert [again.machine.roster.members[name].ordinal for name in "abcde"] == [0, 1, 2, 3, 4]


def damage(payload: bytes) -> bytes:
    return payload[:-1] + b"\0"


def rewritten(change_one: Callable[[Snapshot], object]) -> Callable[[bytes], bytes]:
    def rewrite(payload: bytes) -> bytes:
        snapshot = Snapshot.decode(payload)
        change_one(snapshot)
        return snapshot.encode()

    return rewrite


@pytest.mark.parametrize(
    "rewrite",
    [
        damage,
        rewritten(lambda found: found.state["roster"]["name"].append("stranger")),
        rewritten(lambda found: found.state["roster"]["session"].pop()),
        rewritten(lambda found: found.state["roster"].update(colour=[])),
        rewritten(lambda found: found.state["progress"].pop("scored")),
        rewritten(lambda found: found.state.update(head="00")),
        rewritten(lambda found: found.state.update(head="no hex")),
        rewritten(lambda found: found.state.pop("head")),
    ],
)
def test_a_snapshot_that_cannot_be_used_counts_as_none(
    rewrite: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """It may be damaged, or of a release that kept another state."""
    whole = undisturbed("stein")
    last = max(number for number, kind in enumerate(whole.kinds()) if kind == "snapshot")
    kind, round_, device, payload = whole.journal[last]
    entries = [*whole.journal[:last], (kind, round_, device, rewrite(payload)), *whole.journal[last + 1 :]]
    with caplog.at_level(logging.WARNING, "fedzo"):
        desk = resumed(whole, len(entries), entries)
    assert "the whole journal is replayed" in caplog.text
    expected = state(Desk(whole.settings, journal=whole.journal))
    assert state(desk) | {"clock": None} == expected | {"clock": None}  # The next snapshot is due sooner.


def test_a_journal_of_another_run_is_refused() -> None:
    whole = undisturbed("stein")
    with pytest.raises(ProtocolError, match="other settings"):
        resumed(Desk(change(whole.settings, seed=5)), len(whole.journal), whole.journal)


def test_a_whole_replay_checks_the_snapshots_that_it_meets() -> None:
    whole = undisturbed("stein")
    found = [number for number, kind in enumerate(whole.kinds()) if kind == "snapshot"]
    entries = list(whole.journal)
    entries[found[-1]] = entries[found[0]]
    with pytest.raises(ProtocolError, match="other weights"):
        Desk(whole.settings, journal=entries)


@pytest.mark.parametrize("cut", [0, 1, 11, 12, 20])
def test_a_damaged_snapshot_cannot_be_decoded(cut: int) -> None:
    whole = Snapshot({"a": [1, 2.5]}, b"arrays", b"replica").encode()
    assert Snapshot.decode(whole) == Snapshot({"a": [1, 2.5]}, b"arrays", b"replica")
    with pytest.raises(ProtocolError):
        Snapshot.decode(whole[:cut])
    body = whole[:-32][:cut]
    with pytest.raises(ProtocolError):  # the right hash over the wrong bytes
        Snapshot.decode(body + hashlib.sha256(body).digest())


@pytest.mark.parametrize(
    ("entries", "size", "n_survivors", "due"),
    [
        ([], 10, 100, False),
        ([("report", 1 << 20)], 10, 100, False),  # nothing new to say
        ([("report", 1 << 20), ("update", 10)], 10, 100, True),
        ([("report", 1000), ("update", 10)], 10, 100, False),
        ([("report", 1 << 20), ("update", 10)], 1 << 17, 100, False),
        ([("update", 10)] * 99, 10, 100, False),
        ([("update", 10)] * 100, 1 << 29, 100, True),
        ([("update", 10)] * 100, 1 << 30, 100, False),  # larger than what SQLite takes
        ([("update", 10)] * 41, 10, 100_000, True),
        ([("update", 10)] * 40, 10, 100_000, False),
        ([("update", 10)] * 9, 10, 10_000_000, False),
        ([("update", 10)] * 10, 10, 10_000_000, True),
        ([("report", 1 << 20), ("update", 10), ("snapshot", 5), ("update", 10)], 10, 100, False),
    ],
)
def test_when_the_next_snapshot_is_due(
    entries: list[tuple[str, int]], size: int, n_survivors: int, due: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "MOST_UPDATES", 100)
    clock = SnapshotClock()
    for kind, length in entries:
        clock.count(kind, bytes(length))
    assert clock.is_due(size, n_survivors) is due

"""A server goes on from the newest snapshot as it would from the whole journal."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fedzo.broker_server.journal import Entry, MemoryJournal
from fedzo.broker_server.recovery import entries_to_resume, keep_last_snapshot
from fedzo.protocol import snapshots
from fedzo.protocol.errors import ProtocolError
from fedzo.protocol.snapshots import Snapshot, SnapshotClock
from tests.protocol.simulation.desk import NAMES, Desk, change
from tests.protocol.test_coordinator_restart import SPARSE, VARIANTS, outcome

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
        journal.append([Entry(*entry, float(number))])
        keep_last_snapshot(journal, {entry[0]})
    return journal


def resumed(whole: Desk, cut: int) -> Desk:
    """A new server that has read what it needs of the first entries."""
    desk = Desk(whole.settings, journal=list(entries_to_resume(journal_of(whole.journal[:cut]))))
    desk.journal = whole.journal[:cut]
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
        "clock": vars(machine._clock),
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_newest_snapshot_gives_the_state_of_the_whole_journal(variant: str) -> None:
    whole = undisturbed(variant)
    assert whole.kinds().count("snapshot") == whole.machine.replica.index
    first = whole.kinds().index("snapshot")
    for cut in range(1, len(whole.journal) + 1, max(1, len(whole.journal) // 50)):
        assert state(resumed(whole, cut)) == state(Desk(whole.settings, journal=whole.journal[:cut])), cut
        if cut > first:
            entries = [kind for kind, *_ in entries_to_resume(journal_of(whole.journal[:cut]))]
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


def test_devices_that_enrol_after_a_snapshot_get_the_next_numbers() -> None:
    desk = Desk(change(SPARSE, rounds=4)).connect().join()
    while "snapshot" not in desk.kinds():
        desk.report()
    desk.join("e")
    again = Desk(desk.settings, journal=list(entries_to_resume(journal_of(desk.journal))))
    assert [again.machine.roster.members[name].ordinal for name in "abcde"] == [0, 1, 2, 3, 4]


def test_a_damaged_snapshot_counts_as_none(caplog: pytest.LogCaptureFixture) -> None:
    whole = undisturbed("stein")
    last = max(number for number, kind in enumerate(whole.kinds()) if kind == "snapshot")
    kind, round_, device, payload = whole.journal[last]
    entries = [entry for entry in whole.journal[: last + 3] if entry[0] != "snapshot"]
    place = entries.index(whole.journal[last + 1])
    journal = journal_of([*entries[:place], (kind, round_, device, payload[:-1] + b"\0"), *entries[place:]])
    with caplog.at_level(logging.WARNING, "fedzo"):
        found = list(entries_to_resume(journal))
    assert "is ignored: a snapshot of" in caplog.text
    assert [entry[0] for entry in found].count("update") == whole.kinds()[:last].count("update")
    assert state(Desk(whole.settings, journal=found))["replica"] == Snapshot.decode(payload).replica


@pytest.mark.parametrize(
    "change_one",
    [
        lambda found: found.state["roster"]["name"].append("stranger"),
        lambda found: found.state["roster"]["session"].pop(),
        lambda found: found.state["progress"].pop("scored"),
        lambda found: found.state.update(head="00"),
        lambda found: found.state.update(head="no hex"),
        lambda found: found.state.pop("head"),
    ],
)
def test_a_snapshot_that_does_not_fit_is_refused(change_one: Callable[[Snapshot], object]) -> None:
    whole = undisturbed("stein")
    last = max(number for number, kind in enumerate(whole.kinds()) if kind == "snapshot")
    snapshot = Snapshot.decode(whole.journal[last][3])
    change_one(snapshot)
    wrong = [*whole.journal[:last], ("snapshot", whole.journal[last][1], "", snapshot.encode())]
    with pytest.raises(ProtocolError):
        Desk(whole.settings, journal=list(entries_to_resume(journal_of(wrong))))


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
    ("entries", "size", "due"),
    [
        ([], 10, False),
        ([("report", 1 << 20)], 10, False),  # nothing new to say
        ([("report", 1 << 20), ("update", 10)], 10, True),
        ([("report", 1000), ("update", 10)], 10, False),
        ([("report", 1 << 20), ("update", 10)], 1 << 17, False),
        ([("update", 10)] * 99, 10, False),
        ([("update", 10)] * 100, 1 << 30, True),
        ([("report", 1 << 20), ("update", 10), ("snapshot", 5), ("update", 10)], 10, False),
    ],
)
def test_when_the_next_snapshot_is_due(
    entries: list[tuple[str, int]], size: int, due: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "MOST_UPDATES", 100)
    clock = SnapshotClock()
    for kind, length in entries:
        clock.count(kind, bytes(length))
    assert clock.is_due(size) is due

"""A journal replays to the digests that it holds, and any difference is named."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from fedzo.broker_server.history.inspection import inspect_round, inspect_run
from fedzo.broker_server.history.replay import Replayed, replay_weights
from fedzo.broker_server.journal import Entry, Journal, MemoryJournal
from fedzo.protocol.errors import ConfigError, ProtocolError
from fedzo.protocol.server_side import snapshots
from fedzo.protocol.server_side.snapshots import Snapshot
from fedzo.protocol.wire.documents import Announcement, parse
from fedzo.protocol.wire.messages import Decline, Report
from fedzo.protocol.wire.topics import Channel
from tests.protocol.server_side.test_coordinator_restart import SPARSE, VARIANTS
from tests.protocol.simulation.desk import NAMES, Desk, change
from tests.protocol.simulation.fakes import manifest_for

Entries = list[tuple[Any, int, str, bytes]]


@functools.cache
def played(variant: str) -> Desk:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots, "MOST_UPDATES", 2)
        return Desk(change(SPARSE, **VARIANTS[variant])).connect().join().play()


def journal_of(entries: Entries) -> MemoryJournal:
    journal = MemoryJournal()
    journal.append([Entry(*entry, 100.0 + number) for number, entry in enumerate(entries)])
    return journal


def replay(desk: Desk, entries: Entries | None = None, round_: int | None = None, *, recount: bool = True) -> Replayed:
    journal = journal_of(desk.journal if entries is None else entries)
    manifest = manifest_for(desk.settings.training.estimator)
    return replay_weights(journal, desk.machine.run, manifest, round_, recount=recount)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_digest_of_a_run_follows_from_its_seed_and_its_reports(variant: str) -> None:
    desk = played(variant)
    found = replay(desk)
    kinds = desk.kinds()
    replica = desk.machine.replica
    assert (found.weights_digest, found.log_head) == (replica.digest.hex(), replica.head.hex())
    assert found.is_last
    for kind in ("announce", "update", "mask", "evaluation", "snapshot"):
        assert found.checked[kind] == kinds.count(kind), kind
    assert found.recounted == kinds.count("update") + kinds.count("mask")
    assert kinds.count("snapshot") > 0
    assert replay(desk, recount=False).recounted is None


def test_late_reports_are_counted_again_too() -> None:
    """Every round has one report that comes after its end and counts in the next."""
    settings = change(SPARSE, sparsity=0.0, evaluate_every=0, rounds=6, staleness=2, quorum=2, close_at=3)
    desk = Desk(settings).connect().join()
    for number in range(6):
        late = NAMES[number % 4]
        report = desk.measure(late)
        desk.report(*(name for name in NAMES if name != late))
        if desk.head.phase == "train":
            desk.say(late, report, Channel.REPORT)
    assert replay(desk).recounted == desk.kinds().count("update") == 6
    found, devices = inspect_round(journal_of(desk.journal), 1)
    assert (found.usable, found.reports) == (3, 4)
    assert [row.detail for row in devices] == ["", "", "", "after the round had closed"]


def test_the_weights_of_any_round() -> None:
    """Those after it: the ones that the next round is announced with."""
    desk = played("stein")
    heads = [parse(Announcement, payload) for kind, _, _, payload in desk.journal if kind == "announce"]
    for head, after in pairwise(heads):
        found = replay(desk, round_=head.round)
        assert (found.round, found.phase, found.updates) == (head.round, head.phase, after.log_length)
        assert not found.is_last
        if after.weights_digest:
            assert (found.weights_digest, found.log_head) == (after.weights_digest, after.log_head)
        assert found.mask_sha256 == after.mask_sha256
    last = replay(desk, round_=heads[-1].round)
    assert last.is_last
    assert last.ends == dict.fromkeys(NAMES, True)


@pytest.mark.parametrize("round_", [99, 1 << 40])
def test_a_round_that_never_was(round_: int) -> None:
    with pytest.raises(ConfigError, match=f"no round {round_}: it ends with round"):
        replay(played("stein"), round_=round_)
    with pytest.raises(ConfigError, match="no round has begun"):
        replay(played("stein"), played("stein").journal[:1], round_=1)


def _edit(entries: Entries, kind: str, edit: Callable[[bytes], bytes], which: int = -1) -> Entries:
    places = [number for number, entry in enumerate(entries) if entry[0] == kind]
    place = places[which]
    kind_, round_, device, payload = entries[place]
    return [*entries[:place], (kind_, round_, device, edit(payload)), *entries[place + 1 :]]


def _without(entries: Entries, kind: str, which: int) -> Entries:
    place = [number for number, entry in enumerate(entries) if entry[0] == kind][which]
    return [*entries[:place], *entries[place + 1 :]]


def _json(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda payload: json.dumps({**json.loads(payload), **changes}, sort_keys=True).encode()


def _head(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda payload: dataclasses.replace(parse(Announcement, payload), **changes).encode()


def _snapshot(payload: bytes) -> bytes:
    found = Snapshot.decode(payload)
    return Snapshot(found.state, found.arrays, found.replica[:-4] + b"\0\0\0\x3f").encode()


@pytest.mark.parametrize(
    ("change_all", "words"),
    [
        (lambda e: _edit(e, "announce", _head(weights_digest="0" * 32)), "announce.*it says .*, the replay gives"),
        (lambda e: _edit(e, "announce", _head(log_head="1" * 32)), "announce"),
        (lambda e: _edit(e, "announce", _head(log_length=1)), "announce.*it says 1 updates"),
        (lambda e: _edit(e, "announce", _head(mask_sha256="2" * 64)), "announce"),
        (lambda e: _edit(e, "evaluation", _json(weights_digest="0" * 32)), "evaluation"),
        (lambda e: _edit(e, "update", lambda p: p[:-1] + bytes([p[-1] ^ 1])), "update.*digest"),
        (lambda e: _edit(e, "update", lambda p: p[:-9]), "update"),
        (
            lambda e: _edit(e, "update", lambda _: next(p for kind, _, _, p in e if kind == "report")),
            "update.*a Report",
        ),
        (lambda e: _edit(e, "evaluation", lambda _: b"{"), "evaluation.*cannot be read"),
        (lambda e: _edit(e, "evaluation", lambda _: b"{}"), "evaluation.*cannot be read"),
        (lambda e: _edit(e, "mask", lambda p: p[:-3]), "mask"),
        (lambda e: _without(e, "update", 0), "announce"),
        (lambda e: _without(e, "mask", 0), "announce"),
        (lambda e: _edit(e, "snapshot", _snapshot), "snapshot.*other weights"),
        (lambda e: _edit(e, "snapshot", lambda p: p[:-1] + b"\0"), "snapshot.*damaged"),
    ],
)
def test_what_does_not_follow_is_named(change_all: Callable[[Entries], Entries], words: str) -> None:
    desk = played("stein")
    with pytest.raises(ProtocolError, match=rf"^entry \d+ of the journal \({words}") as caught:
        replay(desk, change_all(list(desk.journal)), recount=False)
    assert caught.value.exit_code == 6
    assert caught.value.hint


def _louder(payload: bytes) -> bytes:
    report = Report.decode(payload)
    blocks = tuple(block * 2 for block in report.blocks)
    return Report(**{name: getattr(report, name) for name in report.__dataclass_fields__} | {"blocks": blocks}).encode()


@pytest.mark.parametrize(
    "change_all",
    [
        lambda e: _edit(e, "report", _louder, 0),  # of the scores
        lambda e: _edit(e, "report", _louder, 13),
        lambda e: _without(e, "report", 13),
    ],
)
def test_a_decision_that_does_not_follow_from_the_reports(change_all: Callable[[Entries], Entries]) -> None:
    desk = played("stein")
    entries = change_all(list(desk.journal))
    assert replay(desk, entries, recount=False).weights_digest == desk.machine.replica.digest.hex()
    with pytest.raises(ProtocolError, match="the reports of its round give another one"):
        replay(desk, entries)


def test_a_device_that_says_something_else_is_named_and_no_more() -> None:
    desk = played("stein")
    found = replay(desk, _edit(list(desk.journal), "phase", lambda _: b"done " + b"0" * 32, 0))
    assert sorted(found.ends.values()) == [False, True, True, True]


# ---------------------------------------------------------------------- who sent what


@pytest.fixture
def eventful() -> tuple[Desk, Journal]:
    """A round with a report, one that could not be made, a refused one, and a device that says nothing."""
    desk = Desk(change(SPARSE, sparsity=0.0, devices=4)).connect().join()
    desk.report("a")
    desk.decline("b", why=Decline.NO_DATA)
    desk.report("c", samples=60_000)
    desk.wait(desk.settings.deadline_s)
    desk.report("a", "b")
    return desk, journal_of(desk.journal)


def test_a_round_device_by_device(eventful: tuple[Desk, Journal]) -> None:
    _, journal = eventful
    found, devices = inspect_round(journal, 1)
    assert (found.phase, found.asked, found.reports, found.refused) == ("train", 4, 2, 1)
    assert [(row.device, row.what) for row in devices] == [
        ("a", "reported"),
        ("b", "declined"),
        ("c", "refused"),
        ("d", "silent"),
    ]
    reported, declined, refused, silent = devices
    assert (reported.scalars, declined.scalars, declined.detail) == (2, 0, "no_data")
    assert "60000 samples" in refused.detail
    assert reported.seconds is not None
    assert reported.payload_bytes > 50
    assert silent.seconds is None


def test_the_rounds_of_a_run(eventful: tuple[Desk, Journal]) -> None:
    desk, journal = eventful
    found = inspect_run(journal)
    assert found.devices == 4
    assert found.entries["report"] == desk.kinds().count("report")
    assert [reason for reason in found.refusals if "60000 samples" in reason]
    assert [row.phase for row in found.rounds] == desk.phases()
    first = found.rounds[0]
    assert (first.asked, first.reports, first.refused, first.report_bytes > 0) == (4, 2, 1, True)


def test_how_rounds_ended() -> None:
    desk = played("stein")
    found = inspect_run(journal_of(desk.journal))
    *closed, last = found.rounds
    assert {row.ending for row in closed} == {"close"}
    assert last.phase == "done"
    assert all(row.seconds is not None and row.usable == 4 and row.in_time for row in closed)
    words = {row.phase: row.outcome for row in closed}
    assert words["train"].startswith("update ")
    assert words["saliency"].startswith("mask of ")
    assert words["evaluate"].startswith("accuracy ")
    assert found.stops == []


def test_a_round_that_cannot_be_shown() -> None:
    with pytest.raises(ConfigError, match="no round 99: it ends with round"):
        inspect_round(journal_of(played("stein").journal), 99)
    with pytest.raises(ConfigError, match="no round has begun"):
        inspect_round(MemoryJournal(), 1)


def test_devices_that_came_later_have_their_own_names() -> None:
    desk = Desk(change(SPARSE, sparsity=0.0, devices=3, evaluate_every=0)).connect().join("b", "c", "d")
    desk.join("a")
    desk.report()
    desk.report("d")
    found, devices = inspect_round(journal_of(desk.journal), 2)
    assert found.asked == 4
    assert [(row.device, row.what) for row in devices] == [
        ("d", "reported"),
        ("b", "silent"),
        ("c", "silent"),
        ("a", "silent"),
    ]

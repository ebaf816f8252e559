"""Who a round asks, and rounds that close as soon as enough have answered."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from fedzo.protocol.errors import ConfigError
from fedzo.protocol.server_side import run_progress
from fedzo.protocol.server_side.coordinator import Coordinator
from fedzo.protocol.server_side.roster import Member
from fedzo.protocol.server_side.run_progress import RunProgress
from fedzo.protocol.server_side.selection import select
from fedzo.protocol.settings import RunSettings
from fedzo.protocol.wire.documents import Hello
from fedzo.protocol.wire.messages import Decline, Receipt, UpdateRecord, Verdict
from fedzo.protocol.wire.participants import unpack_participants
from fedzo.protocol.wire.topics import Channel
from tests.protocol.simulation.desk import SETTINGS, Desk, change, check_order
from tests.protocol.simulation.fakes import cut_manifest, run_document


def members(*ordinals: int) -> list[Member]:
    return [Member(f"dev-{i}", i, Hello(1, "tests", 64.0, 1, 0, "", ""), status="ready") for i in ordinals]


def chosen(seed: int, round_: int, *ordinals: int, wanted: int = 0, most: int = 1000) -> list[int]:
    return [member.ordinal for member in select(seed, round_, members(*ordinals), wanted=wanted, most=most)]


@pytest.mark.parametrize("wanted", [0, 5, 9])
def test_all_are_asked_when_no_fewer_are_wanted(wanted: int) -> None:
    assert chosen(1, 1, 0, 2, 3, 5, 8, wanted=wanted) == [0, 2, 3, 5, 8]


def test_the_draw_is_a_function_of_seed_round_and_who_is_ready() -> None:
    everybody = range(40)
    first = chosen(7, 3, *everybody, wanted=10)
    assert first == chosen(7, 3, *everybody, wanted=10)
    assert len(first) == 10
    assert first == sorted(set(first))
    assert first != chosen(7, 4, *everybody, wanted=10)
    assert first != chosen(8, 3, *everybody, wanted=10)
    # A device that is gone is replaced; whoever else was drawn still is.
    gone = first[0]
    others = chosen(7, 3, *(i for i in everybody if i != gone), wanted=10)
    assert set(first) - {gone} < set(others)


def test_everybody_is_drawn_about_as_often() -> None:
    counts = Counter(i for round_ in range(400) for i in chosen(5, round_, *range(10), wanted=3))
    assert set(counts) == set(range(10))
    assert all(80 < count < 160 for count in counts.values())  # 120 on average, 9 is one standard deviation


def test_too_many_take_turns() -> None:
    turns = [chosen(1, round_, *range(10), most=4) for round_ in range(5)]
    assert turns[0] == [0, 1, 2, 3]
    assert turns[2] == [0, 1, 8, 9]
    assert set(Counter(i for turn in turns for i in turn).values()) == {2}


@pytest.mark.parametrize(("phase", "asked"), [("train", 3), ("saliency", 8), ("evaluate", 8), ("done", 8)])
def test_only_what_goes_into_an_update_has_to_fit_one(phase: Any, asked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_progress, "MAX_PARTICIPANTS", 12)
    settings = change(SETTINGS, estimator="node", staleness=1, quorum=3)
    progress = RunProgress(run_document(settings), cut_manifest())
    head = progress.announce(phase, 1, members(*range(8)))
    assert unpack_participants(head.participants).size == asked


@pytest.mark.parametrize(("quorum", "close_at", "name"), [(4001, 0, "quorum"), (2, 4001, "close at")])
def test_a_quorum_that_no_update_has_room_for_is_refused_at_the_start(quorum: int, close_at: int, name: str) -> None:
    settings = change(SETTINGS, estimator="node", staleness=2, devices=9000, quorum=quorum, close_at=close_at)
    with pytest.raises(ConfigError, match=f"{name} is 4001, .* may ask 4000 devices: 24000 over 2 blocks") as caught:
        Coordinator(run_document(settings), cut_manifest(), birth=1)
    assert caught.value.hint.startswith(f"--{name.replace(' ', '-')} 4000 or less")
    Coordinator(run_document(change(settings, staleness=1)), cut_manifest(), birth=1)


# --- rounds that ask for more than they need ------------------------------------------------------------------------

OVER = change(SETTINGS, participants=3, close_at=2)


def test_a_round_closes_when_enough_have_answered() -> None:
    desk = Desk(OVER).connect().join()
    asked = desk.participants()
    assert len(asked) == 3
    late = desk.measure(asked[2])
    desk.report(*asked[:2])
    assert (desk.head.round, desk.machine.replica.index) == (2, 1)
    (update,) = desk.sent(UpdateRecord)
    assert update.coefficients.size == 4
    # Who was too slow is neither punished nor counted.
    desk.say(asked[2], late, Channel.REPORT)
    assert desk.sent(Receipt)[0].verdict is Verdict.LATE
    assert len(desk.participants()) == 3
    assert desk.machine.roster.count_ready() == 4
    check_order(desk.trace)


def test_reports_that_decline_are_not_enough() -> None:
    desk = Desk(change(SETTINGS, close_at=2)).connect().join()
    desk.decline("a", why=Decline.NO_DATA)
    desk.report("b")
    assert desk.head.round == 1
    desk.report("c")
    assert desk.head.round == 2


def test_fewer_than_enough_close_a_round_when_nobody_else_can_answer_or_at_the_deadline() -> None:
    desk = Desk(change(SETTINGS, close_at=3)).connect().join()
    desk.report("a", "b")
    desk.presence("c", "d", status="lost")
    assert desk.head.round == 2
    desk = Desk(change(SETTINGS, close_at=3)).connect().join()
    desk.report("a", "b")
    desk.wait(10.1)
    assert desk.head.round == 2
    assert desk.participants() == ["a", "b"]  # the others had all the time


def test_an_evaluation_still_waits_for_everybody() -> None:
    desk = Desk(change(SETTINGS, close_at=2, evaluate_every=1)).connect().join()
    desk.report("a", "b")
    assert desk.head.phase == "evaluate"
    desk.report("a", "b", "c")
    assert desk.head.phase == "evaluate"
    desk.report("d")
    assert desk.phases()[-1] == "train"


def test_scores_that_are_still_checked_are_not_enough() -> None:
    desk = Desk(change(SETTINGS, close_at=2, sparsity=0.5))
    desk.differences = dict.fromkeys("abcd")
    desk.connect().join()
    desk.report("a", "b", "c")
    assert (desk.head.phase, desk.head.round) == ("saliency", 1)


@pytest.mark.parametrize("reports", [0, 1])
def test_a_restarted_server_goes_on_with_those_it_has_asked(reports: int) -> None:
    desk = Desk(OVER).connect().join()
    desk.report(*desk.participants()[:2])
    asked, head = desk.participants(), desk.head
    if reports:
        desk.report(*asked[:reports])
    again = Desk(OVER, journal=desk.journal).connect()
    again.join("d", "c", "b", "a")
    assert again.head == head
    assert again.participants() == asked
    again.report(*asked[reports:2])
    desk.report(*asked[reports:2])
    assert again.head == desk.head
    assert again.machine.replica.digest == desk.machine.replica.digest


@pytest.mark.parametrize("changes", [{"close_at": 3}, {"close_at": 9}, {"close_at": 5, "participants": 4}])
def test_a_number_of_reports_that_cannot_be_reached_is_refused(changes: dict[str, Any]) -> None:
    RunSettings(quorum=4, close_at=8)
    with pytest.raises(ConfigError, match=r"close at is \d, it must be 0, or the quorum"):
        RunSettings(**changes)

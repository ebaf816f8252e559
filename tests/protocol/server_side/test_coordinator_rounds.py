"""The coordinator's state machine: when a round closes, and which reports count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedzo.protocol.errors import FedzoError, QuorumError
from fedzo.protocol.server_side.closings import Closing
from fedzo.protocol.server_side.coordinator_events import Record, Send, ServeBlob, ServeLog
from fedzo.protocol.wire.messages import Decline, Receipt, ReportKind, UpdateRecord, Verdict
from fedzo.protocol.wire.topics import Channel
from fedzo.protocol.wire.transfers import BlobRequest, LogRequest
from tests.protocol.simulation.desk import NAMES, SETTINGS, Desk, change, check_order
from tests.protocol.simulation.fakes import TAG

SPARSE = change(SETTINGS, sparsity=0.5)


# --- when a round closes --------------------------------------------------------------------------------------------


def test_a_round_closes_when_everybody_has_answered() -> None:
    desk = Desk().connect().join()
    desk.report("a", "b", "c")
    assert desk.head.round == 1
    desk.report("d")
    assert desk.head.round == 2


@pytest.mark.parametrize("status", ["lost", "left", "refused"])
def test_who_is_gone_is_not_waited_for(status: Any) -> None:
    desk = Desk().connect().join()
    desk.report("a", "b")
    desk.presence("c", status=status)
    assert desk.head.round == 1
    desk.presence("d", status=status)
    assert desk.head.round == 2
    assert desk.participants() == ["a", "b"]


def test_a_round_closes_at_its_deadline_with_the_quorum() -> None:
    desk = Desk().connect().join()
    desk.report("a", "c")
    desk.wait(9.9)
    assert desk.head.round == 1
    desk.wait(0.2)
    assert desk.head.round == 2
    assert desk.participants() == ["a", "c"]


@pytest.mark.parametrize("sign", ["presence", "hello", "late report", "log request", "block request"])
def test_a_silent_device_counts_again_once_it_is_heard(sign: str) -> None:
    desk = Desk().connect().join()
    late = desk.measure("d")
    desk.report("a", "b", "c")
    desk.wait(10.0)
    assert desk.participants() == ["a", "b", "c"]
    if sign == "presence":
        desk.presence("d")
    elif sign == "hello":
        desk.hello("d")
    elif sign == "late report":
        desk.say("d", late, Channel.REPORT)
        assert desk.sent(Receipt) == [Receipt(TAG, 1, Verdict.LATE)]
    elif sign == "log request":
        desk.say("d", LogRequest(0, 5))
    else:
        desk.say("d", BlobRequest(bytes(32), 0, 1))
    desk.report()
    assert desk.participants() == list(NAMES)


def test_below_the_quorum_the_deadline_starts_again_and_devices_are_replaced() -> None:
    desk = Desk(change(SETTINGS, devices=2)).connect().join("a", "b")
    assert desk.participants() == ["a", "b"]
    desk.join("c", "d")
    desk.report("a")
    desk.wait(10.0)
    assert (desk.head.round, desk.head.phase, desk.head.log_length) == (2, "train", 0)
    assert desk.participants() == ["a", "c", "d"]
    desk.report()
    assert desk.machine.replica.index == 1
    (update,) = desk.sent(UpdateRecord)
    assert update.segments == ((0, 6),)


def test_a_round_that_nobody_can_replace_stays_open() -> None:
    desk = Desk().connect().join()
    desk.report("a")
    desk.wait(15.0)
    assert desk.head.round == 1
    assert desk.report("b") == [Verdict.ACCEPTED]  # late, but not too late
    desk.presence("c", "d", status="lost")
    assert desk.head.round == 2


def test_patience_ends() -> None:
    desk = Desk().connect().join()
    desk.report("a")
    desk.wait(29.9)
    assert not desk.machine.finished
    desk.wait(0.2)
    error = desk.finish().error
    assert isinstance(error, QuorumError)
    assert error.message == "round 1: 1 reports after 3 deadlines, the quorum is 2"
    assert error.hint


def test_patience_starts_again_after_a_success() -> None:
    desk = Desk().connect().join()
    for round_ in (1, 2, 3):
        desk.wait(25.0)
        assert desk.head.round == round_
        desk.presence(*NAMES)
        assert desk.report() == [Verdict.ACCEPTED] * 4


def test_between_two_rounds_a_quorum_is_waited_for() -> None:
    desk = Desk().connect().join()
    desk.presence("c", "d", status="lost")
    desk.report("a")
    desk.presence("a", status="lost")
    desk.report("b")
    assert desk.phases() == ["train"]
    assert desk.machine.replica.index == 1
    desk.presence("a")
    assert desk.phases() == ["train", "train"]
    assert desk.participants() == ["a", "b"]


def test_a_round_in_which_nobody_could_compute_stops_the_run() -> None:
    desk = Desk().connect().join()
    desk.decline("a", "b", "c")
    desk.decline("d", why=Decline.FAILED)
    error = desk.finish().error
    assert isinstance(error, QuorumError)
    assert error.message == "round 1: 0 of 4 devices could answer (failed, non_finite), the quorum is 2"
    assert "learning-rate" in error.hint
    assert desk.kinds().count("report") == 4


def test_the_journal_says_that_a_missed_round_was_not_in_time() -> None:
    desk = Desk(change(SETTINGS, quorum=3)).connect().join()
    desk.report("a", "b")
    desk.join("e")
    desk.wait(SETTINGS.deadline_s)
    closings = [Closing.decode(payload) for kind, _, _, payload in desk.journal if kind == "close"]
    assert [(closing.ending, closing.in_time, closing.usable) for closing in closings] == [("missed", False, 2)]


def test_others_that_have_come_get_a_chance() -> None:
    desk = Desk(change(SETTINGS, devices=2)).connect().join("a", "b")
    desk.join("c")
    desk.decline("a", why=Decline.NO_DATA)
    desk.report("b")
    assert not desk.machine.finished
    assert desk.participants() == ["a", "b", "c"]
    desk.decline("a", why=Decline.NO_DATA)
    desk.report("b", "c")
    assert desk.machine.replica.index == 1
    desk.decline("a", "b", "c")
    assert isinstance(desk.finish().error, QuorumError)


def test_declined_reports_do_not_count() -> None:
    desk = Desk().connect().join()
    desk.decline("a", "b")
    desk.report("c", "d")
    assert desk.machine.replica.index == 1
    assert desk.head.round == 2


def test_devices_that_come_later_take_part_in_the_next_round() -> None:
    desk = Desk(change(SETTINGS, devices=2)).connect().join("c", "d")
    desk.report("c")
    desk.join("a")
    order = desk.orders("a")[-1]
    assert (order.action, order.ordinal) == ("welcome", 2)
    desk.report("d")
    assert desk.participants() == ["c", "d", "a"]
    desk.say("a", LogRequest(0, 100))
    assert desk.out == [ServeLog("a", LogRequest(0, 1))]


def test_requests_are_passed_on_within_limits() -> None:
    desk = Desk().connect().join()
    desk.report()
    desk.report()
    request = BlobRequest(bytes(32), 5, 9)
    desk.say("a", request)
    assert desk.out == [ServeBlob("a", request)]
    for first, count, served in ((0, 1, 1), (0, 9, 2), (1, 9, 1), (2, 9, 0), (2**32 - 1, 1, 0)):
        desk.say("a", LogRequest(first, count))
        assert desk.out == ([ServeLog("a", LogRequest(first, served))] if served else [])


# --- which reports count --------------------------------------------------------------------------------------------


def test_a_report_is_recorded_before_its_receipt_and_counts_once() -> None:
    desk = Desk().connect().join()
    report = desk.measure("a")
    desk.say("a", report, Channel.REPORT)
    record, send = desk.out
    assert record == Record("report", 1, "a", report.encode())
    assert send == Send(Channel.ACK, Receipt(TAG, 1, Verdict.ACCEPTED), "a")
    for _ in range(5):
        desk.say("a", report, Channel.REPORT)
        assert desk.out == [Send(Channel.ACK, Receipt(TAG, 1, Verdict.DUPLICATE), "a")]
    desk.say("a", desk.measure("a", samples=1), Channel.REPORT)
    assert desk.sent(Receipt)[0].verdict is Verdict.DUPLICATE


@pytest.mark.parametrize(("round_", "verdict"), [(0, "LATE"), (1, "DUPLICATE"), (3, "LATE"), (2**32 - 1, "LATE")])
def test_reports_of_other_rounds_are_late_or_have_counted(round_: int, verdict: str) -> None:
    """A device has to know which, as it gives what did not count another try."""
    desk = Desk().connect().join()
    desk.report()
    assert desk.head.round == 2
    assert desk.report("a", round=round_) == [Verdict[verdict]]
    assert not any(isinstance(c, Record) for c in desk.out)


def test_a_report_of_another_run_is_late_and_leaves_no_trace() -> None:
    """The same artifact, settings and round: only the tag tells that it was not measured in this run."""
    desk = Desk().connect().join()
    desk.say("a", desk.measure("a", run_tag=b"old!"), Channel.REPORT)
    assert desk.out == [Send(Channel.ACK, Receipt(b"old!", 1, Verdict.LATE), "a")]
    assert desk.report("a") == [Verdict.ACCEPTED]


HOSTILE: dict[str, dict[str, Any]] = {
    "count": {"blocks": (np.ones(3, dtype=np.float32),)},
    "blocks": {"blocks": (np.ones(1, dtype=np.float32), np.ones(1, dtype=np.float32))},
    "digest": {"weights_digest": bytes(16)},
    "kind": {"kind": ReportKind.EVALUATE},
    "huge": {"blocks": (np.array([1, 3e38], dtype=np.float32),)},
    "weight": {"samples": 2**32 - 1},
    "nothing": {"samples": 0},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_reports_are_refused_and_change_nothing(name: str) -> None:
    desk = Desk().connect().join()
    for _ in range(20):
        assert desk.report("a", **HOSTILE[name]) == [Verdict.REFUSED]
    assert desk.kinds().count("refusal") == 1
    assert desk.kinds().count("report") == 0
    desk.report("b", "c", "d")
    assert desk.head.round == 2  # it was not waited for
    assert "a" in desk.participants()
    check_order(desk.trace)


def test_a_refused_device_may_still_mend_its_report() -> None:
    desk = Desk().connect().join()
    assert desk.report("a", **HOSTILE["digest"]) == [Verdict.REFUSED]
    assert desk.report("a") == [Verdict.ACCEPTED]


def test_who_takes_no_part_is_refused() -> None:
    desk = Desk(change(SETTINGS, devices=2)).connect().join("a", "b").join("c")
    assert desk.participants() == ["a", "b"]
    assert desk.report("c") == [Verdict.REFUSED]
    assert b"not a participant" in desk.journal[-1][3]


def test_divergence_stops_the_run() -> None:
    """A moment that overflows float32 would freeze its weight for good."""
    desk = Desk(change(SETTINGS, scalar_limit=1e20)).connect().join()
    assert desk.settings.training.optimiser.name == "adam"
    desk.report(*NAMES, blocks=(np.full(2, 9e19, dtype=np.float32),))
    error = desk.finish().error
    assert type(error) is FedzoError
    assert "diverged" in error.message
    assert error.hint
    assert desk.machine.replica.index == 0
    assert desk.kinds()[-1] == "phase"
    assert "update" not in desk.kinds()

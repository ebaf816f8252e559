"""The device's state machine: rounds, sessions, runs, and anything in any order."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest

from fedzo.protocol.device_side.device_events import (
    BlobFound,
    Cancel,
    Compute,
    Computed,
    Connected,
    DeviceEvent,
    Disconnected,
    DropReport,
    Finish,
    Outcome,
    Plan,
    Planned,
    Prepared,
    Received,
    SaveReport,
    Send,
    Tick,
)
from fedzo.protocol.errors import SelfTestError
from fedzo.protocol.wire.documents import Announcement, Order, ServerPresence, pack_participants
from fedzo.protocol.wire.messages import Decline, Receipt, Report, ReportKind, Verdict
from fedzo.protocol.wire.topics import Channel
from fedzo.protocol.wire.transfers import BlobBlock, LogSlice
from tests.protocol.simulation.bench import FILES, RETRY_S, SESSION, Bench, other_run
from tests.protocol.simulation.fakes import TAG

# --- rounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("updates", "first"), [(0, 3), (1, 9 + 6), (2, 18 + 0), (3, 27 + 3)])
def test_a_probe_task(updates: int, first: int) -> None:
    """Of three devices with three directions each it has the second place, and another part every round."""
    bench = Bench().plan()
    bench.announce("enrol", 0)
    for round_ in range(updates):
        bench.update(round_)
    bench.announce(round_=17)
    if updates:
        bench.hear(Channel.BLOCK, LogSlice(0, tuple(bench.log)))
    task = bench.only(Compute).task
    assert (task.kind, task.round, task.ordinal) == (ReportKind.PROBE, 17, 1)
    assert [part.tolist() for part in task.positions] == [[first, first + 1, first + 2]]
    assert np.array_equal(task.weights, bench.server.weights)
    task.weights[0] = 5.0  # a copy of its own
    assert bench.device.replica is not None
    assert bench.device.replica.digest == bench.server.digest


@pytest.mark.parametrize(("phase", "kind"), [("saliency", ReportKind.SALIENCY), ("evaluate", ReportKind.EVALUATE)])
def test_tasks_of_other_phases(phase: Any, kind: ReportKind) -> None:
    bench = Bench()
    task = bench.compute(phase)
    assert task.kind is kind
    assert task.positions == ()
    bench.answer(task)
    assert bench.only(SaveReport).report.kind is kind


def test_a_device_that_is_no_participant_stays_idle() -> None:
    bench = Bench().plan()
    bench.announce(participants=pack_participants(np.array([0, 2])))
    assert bench.device.stage == "idle"
    assert not any(isinstance(c, Compute) for c in bench.out)
    bench.announce(round_=2)
    assert bench.device.stage == "computing"


def test_participants_that_cannot_be_read_are_said_once() -> None:
    bench = Bench().plan()
    bench.announce(participants=bytes(3))
    assert "participants" in bench.presence().detail
    assert bench.give(Tick(), Tick()) == []
    bench.announce(round_=2)
    assert bench.device.stage == "computing"


def test_a_report_is_saved_before_it_is_sent() -> None:
    bench = Bench()
    task = bench.compute()
    outcome = {"mean_loss": 0.5, "queries": 4, "elapsed_ms": 9, "peak_rss_kib": 100}
    bench.answer(task, **outcome)
    saved, sent = bench.out
    assert isinstance(saved, SaveReport)
    assert isinstance(sent, Send)
    assert sent.message is saved.report
    assert (saved.run, sent.channel) == (bench.run.run, Channel.REPORT)
    report = saved.report
    assert (report.round, report.session, report.samples) == (1, SESSION, 5)
    assert report.weights_digest == bench.server.digest
    assert {name: getattr(report, name) for name in outcome} == outcome


@pytest.mark.parametrize("verdict", Verdict)
def test_any_receipt_empties_the_outbox_and_nothing_is_computed_again(verdict: Verdict) -> None:
    bench = Bench()
    bench.report()
    bench.hear(Channel.ACK, Receipt(TAG, 2, verdict), Receipt(TAG, 0, verdict), Receipt(b"else", 1, verdict))
    assert bench.out == []
    bench.hear(Channel.ACK, Receipt(TAG, 1, verdict))
    assert bench.out == [DropReport()]
    bench.hear(Channel.ACK, Receipt(TAG, 1, verdict))
    bench.hear(Channel.HEAD, bench.head())
    assert bench.out == []
    assert bench.device.stage == "idle"


def test_a_new_round_drops_the_report_of_the_old_one() -> None:
    bench = Bench()
    bench.report()
    bench.announce(round_=2)
    bench.only(DropReport)
    assert bench.only(Compute).task.round == 2


def test_an_older_announcement_is_ignored() -> None:
    bench = Bench()
    bench.compute(round_=5)
    bench.hear(Channel.HEAD, bench.head(round_=4))
    assert bench.out == []
    assert bench.device.stage == "computing"


def test_a_new_round_cancels_the_task_once() -> None:
    bench = Bench()
    task = bench.compute()
    bench.hear(Channel.HEAD, bench.head(round_=2))
    assert bench.out == [Cancel()]
    assert bench.give(Tick()) == []
    bench.hear(Channel.HEAD, bench.head(round_=3))
    assert bench.out == []
    bench.give(Computed(task.number + 7, None))
    assert bench.out == []
    bench.give(Computed(task.number, None))
    assert bench.only(Compute).task.round == 3


def test_an_answer_that_comes_too_late_is_not_reported() -> None:
    bench = Bench()
    task = bench.compute()
    bench.hear(Channel.HEAD, bench.head(round_=2))
    bench.answer(task)
    assert not any(isinstance(c, SaveReport) for c in bench.out)
    assert bench.only(Compute).task.round == 2
    bench.answer(task)
    assert bench.out == []


def test_a_report_names_the_weights_that_were_measured() -> None:
    """Not those that an update has made of them in the meantime."""
    bench = Bench()
    task, before = bench.compute(), bench.server.digest
    bench.hear(Channel.LOG, bench.update(1))
    bench.answer(task)
    assert bench.only(SaveReport).report.weights_digest == before != bench.server.digest


def test_a_voided_round_is_computed_again_under_its_new_number() -> None:
    bench = Bench()
    bench.report()
    bench.hear(Channel.ACK, Receipt(TAG, 1, Verdict.ACCEPTED))
    bench.announce(round_=2, participants=pack_participants(np.array([1])))
    task = bench.only(Compute).task
    assert [part.tolist() for part in task.positions] == [[0, 1, 2]]


NOT_SENDABLE: dict[str, tuple[dict[str, Any], Decline]] = {
    "declined": ({"blocks": (), "decline": Decline.OVER_BUDGET, "detail": "no memory"}, Decline.OVER_BUDGET),
    "NaN": ({"blocks": (np.array([1, np.nan, 2], dtype=np.float32),)}, Decline.NON_FINITE),
    "infinity": ({"blocks": (np.array([1, np.inf, 2], dtype=np.float32),)}, Decline.NON_FINITE),
    "NaN loss": ({"mean_loss": float("nan")}, Decline.NON_FINITE),
    "NaN loss, declined": ({"blocks": (), "mean_loss": float("inf"), "decline": Decline.FAILED}, Decline.FAILED),
    "nothing": ({"blocks": ()}, Decline.FAILED),
    "too much": ({"blocks": (np.zeros(70_000, dtype=np.float32),)}, Decline.FAILED),
    "too many blocks": ({"blocks": (np.zeros(1, dtype=np.float32),) * 17}, Decline.FAILED),
    "negative samples": ({"samples": -1}, Decline.FAILED),
}


@pytest.mark.parametrize("name", NOT_SENDABLE)
def test_what_cannot_be_sent_is_declined(name: str) -> None:
    """A round without an answer would cost everybody the deadline; the same task again and again even more."""
    changes, decline = NOT_SENDABLE[name]
    bench = Bench()
    bench.answer(bench.compute(), **changes)
    report = bench.only(SaveReport).report
    assert report.decline is decline
    assert report.blocks == ()
    assert Report.decode(report.encode()).decline is decline
    assert bench.sent(Report) == [report]
    if "detail" in changes:
        assert bench.presence().detail == "no memory"
    bench.hear(Channel.ACK, Receipt(TAG, 1, Verdict.ACCEPTED))
    assert bench.device.stage == "idle"


def test_details_travel_whatever_they_hold() -> None:
    bench = Bench()
    bench.answer(bench.compute(), blocks=(), decline=Decline.FAILED, detail="no such file \udcff" + "x" * 5_000)
    detail = bench.presence().detail
    assert detail.startswith("no such file ?x")
    assert len(detail) == 500
    bench.presence().encode()


def test_the_end() -> None:
    bench = Bench()
    bench.report()
    bench.update(1)
    bench.hear(Channel.HEAD, bench.head("done", 2))
    bench.only(DropReport)
    assert bench.device.stage == "following"
    bench.hear(Channel.BLOCK, LogSlice(0, tuple(bench.log)))
    presence = bench.presence()
    assert (presence.status, presence.log_length) == ("done", 1)
    assert presence.weights_digest == bench.server.digest.hex()
    assert bench.out[-1] == Finish()
    assert bench.hear(Channel.HEAD, bench.head(round_=3)) == []


# --- sessions and runs ----------------------------------------------------------------------------------------------


def test_an_outbox_of_an_earlier_session_is_delivered_and_not_computed_again() -> None:
    report = Bench().report(round_=4)
    bench = Bench(outbox=("run-1", report))
    bench.join()
    assert bench.sent(Report) == [report]  # before anything is fetched or planned
    bench.wait(RETRY_S)
    assert bench.sent(Report) == [report]
    bench.give(Planned(bench.run.run, 1.0, 8))
    bench.announce(round_=4)
    assert bench.device.stage == "reporting"
    bench.hear(Channel.ACK, Receipt(TAG, 4, Verdict.DUPLICATE))
    assert bench.out == [DropReport()]
    assert bench.device.stage == "idle"
    bench.announce(round_=5)
    assert bench.only(Compute).task.round == 5


@pytest.mark.parametrize(("run", "round_"), [("run-0", 4), ("run-1", 3)])
def test_an_outbox_that_nobody_wants_is_dropped(run: str, round_: int) -> None:
    report = Bench().report(round_=round_)
    bench = Bench(outbox=(run, report))
    bench.plan()
    bench.announce(round_=4)
    assert bench.device.stage == "computing"
    assert bench.sent(Report) == []


def test_another_run_takes_over() -> None:
    bench = Bench()
    task = bench.compute()
    new = other_run(bench)
    bench.hear(Channel.RUN, new)
    assert bench.out[0] == Cancel()
    assert bench.presence().run == "run-2"
    assert bench.device.replica is None
    assert bench.device.stage == "greeting"
    assert bench.give(Computed(task.number, None)) == []
    assert bench.welcome() == []  # of the old run
    bench.run = new
    bench.welcome()
    bench.only(Plan)
    assert bench.give(Planned("run-1", 1.0, 8)) == []
    bench.give(Planned("run-2", 1.0, 8))
    bench.announce()
    assert bench.device.stage == "computing"


def test_the_same_run_again_changes_nothing() -> None:
    bench = Bench()
    bench.compute()
    assert bench.hear(Channel.RUN, bench.run) == []


def test_an_announcement_of_another_run_waits_for_that_run() -> None:
    bench = Bench()
    bench.compute(round_=3)
    new = other_run(bench)
    head = dataclasses.replace(bench.head(), run="run-2")
    assert bench.hear(Channel.HEAD, head) == []
    assert bench.device.stage == "computing"
    bench.hear(Channel.RUN, new)
    bench.run = new
    bench.welcome()
    bench.give(Planned("run-2", 1.0, 8))
    bench.prepare()
    assert bench.only(Compute).task.round == 1


def test_a_late_announcement_of_the_run_before_is_ignored() -> None:
    bench = Bench()
    bench.compute()
    old = Announcement("run-0", 99, "done")
    assert bench.hear(Channel.HEAD, old) == []
    bench.hear(Channel.HEAD, bench.head(round_=2))
    assert bench.out == [Cancel()]


def test_blobs_that_nobody_asked_for_are_ignored() -> None:
    bench = Bench().connect()
    bench.give(BlobFound(bytes(32), True, b"x"))
    bench.hear(Channel.BLOCK, BlobBlock(bytes(32), 0, 1, b"x"))
    assert bench.device.stage == "waiting"
    bench.hear(Channel.RUN, bench.run)
    bench.welcome()
    bench.give(BlobFound(bytes(32), True, b"x"))
    assert bench.device.stage == "planning"


# --- anything in any order ------------------------------------------------------------------------------------------


def anything(bench: Bench, source: random.Random) -> DeviceEvent:
    """An event that is possible, though not necessarily now."""
    device, run = bench.device, bench.run.run
    round_ = source.randrange(1, 8)
    messages: list[tuple[Channel, Any]] = [
        (Channel.RUN, bench.run),
        (Channel.RUN, other_run(bench)),
        (Channel.HEAD, bench.head(source.choice(["enrol", "saliency", "train", "evaluate"]), round_)),
        (Channel.HEAD, bench.head("train", round_, log_length=source.randrange(6), log_head="12" * 16)),
        (Channel.HEAD, dataclasses.replace(bench.head("train", round_), run="run-2")),
        (Channel.HEAD, bench.head("train", round_, participants=bytes(3))),
        (Channel.COMMAND, Order(run, source.choice(["enrol", "welcome"]), SESSION, source.randrange(3))),
        (Channel.SERVER, ServerPresence(source.random() < 0.5, source.randrange(4))),
        (Channel.ACK, Receipt(TAG, round_, source.choice(list(Verdict)))),
        (Channel.LOG, source.choice(bench.log)),
        (Channel.BLOCK, LogSlice(0, tuple(bench.log[: source.randrange(1, 5)]))),
        (Channel.BLOCK, BlobBlock(source.choice(list(FILES)), 0, 1, b"x")),
    ]
    task = device._computing
    events: list[DeviceEvent] = [
        Connected(),
        Disconnected(),
        Tick(),
        Planned(run, 1.0, 8),
        Prepared(run, ""),
        Prepared("run-2", ""),
        BlobFound(source.choice(list(FILES)), False),
        Computed(task.number if task else 3, None),
        Computed(task.number if task else 3, Outcome((np.ones(3, dtype=np.float32),), 4)),
        Computed(task.number if task else 3, Outcome((), 0, mean_loss=float("nan"))),
    ]
    channel, message = source.choice(messages)
    return source.choice([*events, *[Received(channel, message)] * 20])


@pytest.mark.parametrize("seed", range(60))
def test_anything_in_any_order_neither_raises_nor_spins(seed: int) -> None:
    source, bench = random.Random(seed), Bench()
    for round_ in range(1, 5):
        bench.update(round_)
    if seed % 2:
        bench.join()
    for _ in range(120):
        bench.now += source.choice([0.0, 0.1, 6.0])
        bench.give(anything(bench, source))
        if bench.device.finished:
            assert isinstance(bench.only(Finish).error, SelfTestError)
            break

"""A plan that did not hold: the device says so, its micro-batch is lowered or it is excused, and the run goes on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fedzo.protocol.device_side.device_events import (
    Cancel,
    Compute,
    Computed,
    Connected,
    Disconnected,
    Finish,
    Outcome,
    OverBudget,
    Plan,
    Planned,
    Prepare,
    Prepared,
    SaveReport,
)
from fedzo.protocol.errors import MemoryBudgetError, QuorumError
from fedzo.protocol.server_side.coordinator_events import Finish as ServerFinish
from fedzo.protocol.server_side.coordinator_events import Send
from fedzo.protocol.wire.documents import Order, Presence
from fedzo.protocol.wire.messages import Decline, Receipt, Report, Verdict
from fedzo.protocol.wire.topics import Channel
from tests.protocol.simulation.bench import RETRY_S, Bench
from tests.protocol.simulation.desk import NAMES, SETTINGS, Desk, change, check_order
from tests.protocol.simulation.fakes import TAG
from tests.protocol.simulation.network import Faults
from tests.protocol.simulation.world import World, check_end, replay

OVER: dict[str, Any] = {"blocks": (), "samples": 0, "decline": Decline.OVER_BUDGET, "detail": "needs 9 MiB"}

# --- the device -----------------------------------------------------------------------------------------------------


def at_prepare(bench: Bench, round_: int = 1) -> None:
    """The engine cannot be opened."""
    bench.plan()
    bench.hear(Channel.HEAD, bench.head(round_=round_))
    bench.only(Prepare)
    bench.give(OverBudget(bench.run.run, "needs 9 MiB"))


def at_compute(bench: Bench, round_: int = 1) -> None:
    """It cannot compute."""
    bench.answer(bench.compute(round_=round_), **OVER)


@pytest.mark.parametrize("fail", [at_prepare, at_compute])
def test_a_plan_that_did_not_hold_is_reported_with_its_micro_batch(fail: Any) -> None:
    bench = Bench()
    fail(bench)
    (report,) = bench.sent(Report)
    assert (report.decline, report.micro_batch, report.round, report.blocks) == (Decline.OVER_BUDGET, 8, 1, ())
    assert report.run_tag == bench.run.tag
    assert bench.only(SaveReport).report == report
    presence = bench.presence()
    assert (presence.status, presence.micro_batch, presence.detail) == ("ready", 8, "needs 9 MiB")
    assert bench.device.stage == "reporting"
    bench.hear(Channel.ACK, Receipt(TAG, 1, Verdict.ACCEPTED))
    assert bench.device.stage == "idle"


@pytest.mark.parametrize("fail", [at_prepare, at_compute])
def test_a_lower_micro_batch_is_planned_and_prepared_and_takes_part(fail: Any) -> None:
    bench = Bench()
    fail(bench)
    bench.hear(Channel.ACK, Receipt(TAG, 1, Verdict.ACCEPTED))
    bench.welcome(micro_batch=4)
    assert bench.only(Plan).micro_batch == 4
    bench.give(Planned(bench.run.run, 9.0, 4))
    assert (bench.presence().micro_batch, bench.presence().detail) == (4, "")
    bench.prepare()
    bench.announce(round_=2)
    task = bench.only(Compute).task
    bench.answer(task)
    (report,) = bench.sent(Report)
    assert (report.decline, report.micro_batch) == (Decline.NONE, 4)


@pytest.mark.parametrize("fail", [at_prepare, at_compute])
def test_until_then_rounds_are_declined_without_computing_and_the_device_reminds(fail: Any) -> None:
    bench = Bench()
    fail(bench)
    for round_ in (2, 3):
        bench.hear(Channel.HEAD, bench.head(round_=round_))
        assert not any(isinstance(command, (Compute, Prepare)) for command in bench.out)
        (report,) = bench.sent(Report)
        assert (report.round, report.decline, report.micro_batch) == (round_, Decline.OVER_BUDGET, 8)
        bench.hear(Channel.ACK, Receipt(TAG, round_, Verdict.ACCEPTED))
    bench.wait(3 * RETRY_S)
    reminders = [presence for presence in bench.sent(Presence) if presence.micro_batch == 8]
    assert len(reminders) >= 2


@pytest.mark.parametrize("limit", [0, 8, 16, 65_535])
def test_a_limit_that_the_plan_keeps_changes_nothing(limit: int) -> None:
    bench = Bench()
    task = bench.compute()
    bench.welcome(micro_batch=limit)
    assert bench.out == []
    bench.answer(task)
    assert bench.sent(Report)[0].decline is Decline.NONE


def test_the_smallest_limit_holds_in_whatever_order_they_come() -> None:
    bench = Bench()
    at_compute(bench)
    bench.welcome(micro_batch=2)
    assert bench.only(Plan).micro_batch == 2
    for limit in (4, 2, 0, 8):
        bench.welcome(micro_batch=limit)
        assert not any(isinstance(command, Plan) for command in bench.out)
    bench.give(Planned(bench.run.run, 9.0, 2))
    bench.welcome(micro_batch=4)
    assert not any(isinstance(command, Plan) for command in bench.out)
    bench.welcome(micro_batch=1)
    assert bench.only(Plan).micro_batch == 1


def test_answers_from_before_a_limit_mean_nothing() -> None:
    bench = Bench()
    bench.plan()
    bench.hear(Channel.HEAD, bench.head())
    bench.only(Prepare)
    bench.welcome(micro_batch=4)
    bench.only(Plan)
    for stale in (Prepared(bench.run.run, ""), OverBudget(bench.run.run, "late")):
        bench.give(stale)
        assert bench.device.stage == "planning"
    bench.welcome(micro_batch=2)
    bench.give(Planned(bench.run.run, 9.0, 4))
    assert bench.only(Plan).micro_batch == 2
    bench.give(Planned(bench.run.run, 9.0, 2))
    bench.only(Prepare)
    bench.give(Prepared(bench.run.run, ""))
    assert bench.only(Compute).task.round == 1


def test_what_is_computed_when_a_limit_comes_is_given_up_and_done_again() -> None:
    bench = Bench()
    task = bench.compute()
    bench.welcome(micro_batch=4)
    bench.only(Cancel)
    bench.only(Plan)
    bench.give(Computed(task.number, None))
    bench.give(Planned(bench.run.run, 9.0, 4))
    bench.prepare()
    assert bench.only(Compute).task.round == task.round


def test_a_welcome_may_bring_the_limit_before_there_is_a_plan() -> None:
    bench = Bench()
    bench.connect()
    bench.hear(Channel.RUN, bench.run)
    bench.welcome(micro_batch=4)
    assert bench.only(Plan).micro_batch == 4


def test_a_failure_that_comes_when_the_round_is_over_is_not_forgotten() -> None:
    bench = Bench()
    task = bench.compute()
    bench.hear(Channel.HEAD, bench.head(round_=2))
    bench.give(Computed(task.number, Outcome((), 0, decline=Decline.OVER_BUDGET, detail="needs 9 MiB")))
    (report,) = bench.sent(Report)
    assert (report.round, report.decline) == (2, Decline.OVER_BUDGET)


def test_an_offline_device_keeps_what_it_knows() -> None:
    bench = Bench()
    task = bench.compute()
    bench.give(Disconnected())
    bench.give(Computed(task.number, Outcome((), 0, decline=Decline.OVER_BUDGET, detail="needs 9 MiB")))
    assert bench.sent(Report) == []
    bench.give(Connected())
    assert bench.sent(Report)[0].decline is Decline.OVER_BUDGET


def test_an_excused_device_leaves_with_the_reason() -> None:
    bench = Bench()
    at_compute(bench)
    bench.welcome(action="excuse", detail="over the memory budget with a micro-batch of 1")
    error = bench.only(Finish).error
    assert isinstance(error, MemoryBudgetError)
    assert error.exit_code == 4
    assert bench.presence().status == "refused"
    assert bench.presence().detail == "does not fit: over the memory budget with a micro-batch of 1"


def test_an_excuse_of_another_session_is_ignored() -> None:
    bench = Bench()
    at_compute(bench)
    bench.welcome(action="excuse", session=6)
    assert not bench.device.finished


# --- the coordinator ------------------------------------------------------------------------------------------------


def over(desk: Desk, name: str, micro_batch: int) -> Order:
    """A device declines; gives the order that answers."""
    desk.micro_batches[name] = micro_batch
    desk.decline(name, why=Decline.OVER_BUDGET)
    return desk.orders(name)[-1]


def test_a_decline_halves_the_micro_batch() -> None:
    desk = Desk().connect().join()
    order = over(desk, "a", 8)
    assert (order.action, order.ordinal, order.session, order.micro_batch) == ("welcome", 0, 1, 4)
    desk.report("b", "c", "d")
    assert desk.participants() == ["b", "c", "d"]
    desk.micro_batches["a"] = 4
    desk.presence("a")
    desk.report("b", "c", "d")
    assert desk.participants() == list(NAMES)
    check_order(desk.trace)


@pytest.mark.parametrize(("micro_batch", "limit"), [(2, 1), (3, 1), (7, 3), (32, 16), (65_535, 32_767)])
def test_limits(micro_batch: int, limit: int) -> None:
    assert over(Desk().connect().join(), "b", micro_batch).micro_batch == limit


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_nothing_left_to_lower_excuses_the_device(micro_batch: int) -> None:
    desk = Desk().connect().join()
    order = over(desk, "a", micro_batch)
    assert (order.action, order.session) == ("excuse", 1)
    assert order.detail == f"over the memory budget with a micro-batch of {micro_batch or 8}"
    desk.presence("a", micro_batch=micro_batch or 8)
    assert desk.sent(Order) == [order]  # the first was perhaps lost
    desk.report("b", "c", "d")
    assert desk.participants() == ["b", "c", "d"]
    desk.hello("a")
    assert desk.sent(Order) == [order]
    desk.play("b", "c", "d")
    desk.presence("b", "c", "d", status="done", weights_digest=desk.machine.replica.digest.hex())
    assert desk.machine.finished
    assert isinstance(desk.trace[-1], ServerFinish)
    assert desk.machine.replica.index == 3


def test_the_order_is_repeated_as_long_as_the_device_does_not_obey() -> None:
    desk = Desk().connect().join()
    over(desk, "a", 8)
    report = desk.measure("a", blocks=(), decline=Decline.OVER_BUDGET)
    for message, channel in ((report, Channel.REPORT), (report, Channel.REPORT)):
        desk.say("a", message, channel)
        assert [order.micro_batch for order in desk.sent(Order)] == [4]
    desk.presence("a")
    assert [order.micro_batch for order in desk.sent(Order)] == [4]
    desk.hello("a")
    assert [order.micro_batch for order in desk.sent(Order)] == [4]
    desk.micro_batches["a"] = 4
    desk.presence("a")
    assert desk.sent(Order) == []


def test_a_late_decline_changes_nothing() -> None:
    desk = Desk().connect().join()
    late = desk.measure("a", blocks=(), decline=Decline.OVER_BUDGET)
    desk.report()
    desk.say("a", late, Channel.REPORT)
    assert desk.sent(Order) == []
    assert "a" in desk.participants()


def test_a_round_below_the_quorum_waits_for_those_that_plan_again() -> None:
    desk = Desk(change(SETTINGS, quorum=4)).connect().join()
    for micro_batch in (8, 4):
        round_ = desk.head.round
        over(desk, "a", micro_batch)
        desk.report("b", "c", "d")
        assert desk.head.round == round_  # nobody else is there to make up the quorum
        assert not desk.machine.finished
        desk.micro_batches["a"] = micro_batch // 2
        desk.presence("a")
        assert (desk.head.round, desk.head.phase) == (round_ + 1, "train")
        assert desk.participants() == list(NAMES)
    desk.report()
    assert desk.machine.replica.index == 1


def test_who_was_lowered_before_the_last_answer_came_makes_up_the_quorum() -> None:
    desk = Desk(change(SETTINGS, quorum=4)).connect().join()
    over(desk, "a", 8)
    desk.micro_batches["a"] = 4
    desk.presence("a")
    desk.report("b", "c", "d")
    assert desk.head.round == 2
    assert desk.participants() == list(NAMES)


def test_in_place_of_an_excused_device_another_one_is_waited_for() -> None:
    desk = Desk(change(SETTINGS, quorum=4)).connect().join()
    desk.report("b", "c", "d")
    over(desk, "a", 1)
    desk.wait(20.0)
    assert not desk.machine.finished
    desk.join("e")
    assert (desk.head.round, desk.participants()) == (2, ["b", "c", "d", "e"])


def test_a_quorum_that_needs_an_excused_device_is_waited_for_and_stops_the_run() -> None:
    desk = Desk(change(SETTINGS, quorum=4)).connect().join()
    desk.report("b", "c", "d")
    over(desk, "a", 1)
    desk.wait(29.9)
    assert not desk.machine.finished
    desk.wait(0.2)
    error = desk.finish().error
    assert isinstance(error, QuorumError)
    assert error.message == "3 devices are ready, the quorum is 4"


def test_others_that_cannot_compute_stop_the_run_all_the_same() -> None:
    desk = Desk().connect().join()
    over(desk, "a", 1)
    desk.decline("b", "c", "d")
    assert (desk.head.round, desk.participants()) == (2, ["b", "c", "d"])
    desk.decline("b", "c", "d")
    assert isinstance(desk.finish().error, QuorumError)


def test_a_device_that_never_plans_again_does_not_keep_a_hopeless_run_alive() -> None:
    desk = Desk().connect().join()
    over(desk, "a", 8)
    for _ in range(2 * SETTINGS.patience):
        if not desk.machine.finished:
            desk.decline("b", "c", "d")
            desk.wait(SETTINGS.deadline_s)
    assert desk.machine.finished
    assert desk.head.round <= SETTINGS.patience + 2


def test_devices_that_do_not_come_back_are_waited_for_as_long_as_any() -> None:
    desk = Desk(change(SETTINGS, quorum=4)).connect().join()
    over(desk, "a", 8)
    desk.report("b", "c", "d")
    desk.wait(29.9)
    assert not desk.machine.finished
    desk.wait(0.2)
    assert isinstance(desk.finish().error, QuorumError)


@pytest.mark.parametrize("micro_batch", [8, 1])
def test_a_restart_finds_limits_in_the_journal(micro_batch: int) -> None:
    desk = Desk().connect().join()
    order = over(desk, "a", micro_batch)
    again = Desk(journal=desk.journal).connect()
    again.micro_batches["a"] = micro_batch
    again.presence("a")
    assert again.sent(Order) == [order]
    again.presence("b", "c", "d")
    again.report("b", "c", "d")
    assert again.participants() == ["b", "c", "d"]


def test_a_restart_with_everybody_heard_below_the_quorum_goes_on() -> None:
    desk = Desk(change(SETTINGS, quorum=4)).connect().join()
    over(desk, "a", 8)
    desk.report("b", "c", "d")
    again = Desk(desk.settings, journal=desk.journal).connect()
    assert not again.machine.finished
    again.micro_batches["a"] = 4
    again.presence(*NAMES)
    assert again.head.round == 2
    assert again.participants() == list(NAMES)


def test_a_device_that_starts_again_starts_without_a_limit() -> None:
    """It was perhaps given more memory."""
    desk = Desk().connect().join()
    over(desk, "a", 1)
    late = desk.measure("a", blocks=(), decline=Decline.OVER_BUDGET)
    desk.sessions["a"] = 2
    desk.hello("a")
    assert (desk.orders("a")[-1].action, desk.orders("a")[-1].micro_batch) == ("welcome", 0)
    desk.micro_batches["a"] = 8
    desk.presence("a")
    desk.report("b", "c", "d")
    assert "a" in desk.participants()
    desk.say("a", dataclasses.replace(late, round=desk.head.round), Channel.REPORT)  # of the process before
    assert not any(isinstance(command, Send) and isinstance(command.message, Order) for command in desk.out)
    again = Desk(journal=desk.journal).connect().join("a")
    assert again.orders("a")[-1].micro_batch == 0


# --- both, with a network -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opens", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_a_run_with_boards_that_are_smaller_than_they_think(seed: int, opens: bool) -> None:
    settings = change(SETTINGS, rounds=12, quorum=3, patience=100, sparsity=0.5, evaluate_every=4, seed=seed)
    faults = Faults(drop=0.05, duplicate=0.3, delay_s=0.5)
    world = World(settings, 4, seed=seed, faults=faults, has_test_set=True)
    for node, fits in zip(world.devices.values(), (8, 3, 1, 0), strict=True):
        node.fits, node.opens = fits, opens
    world.start().finish(limit_s=3_000)
    check_end(world)
    check_order(world.server.trace)
    members = world.server.coordinator.roster.members
    assert [node.micro_batch for node in world.devices.values()] == [8, 2, 1, 1]
    assert [member.is_excused for _, member in sorted(members.items())] == [False, False, False, True]
    assert isinstance(world.devices["dev-3"].error, MemoryBudgetError)
    again = replay(world.server).roster.members
    assert {name: member.micro_batch_limit for name, member in again.items()} == {
        "dev-0": None,
        "dev-1": 2,
        "dev-2": 1,
        "dev-3": 0,
    }
    assert {name: member.micro_batch_limit for name, member in members.items()} == {
        name: member.micro_batch_limit for name, member in again.items()
    }


def test_a_run_in_which_every_board_is_needed_finishes() -> None:
    settings = change(SETTINGS, rounds=3, devices=2, quorum=2)
    world = World(settings, 2)
    for node in world.devices.values():
        node.fits = 1
    world.start().finish()
    check_end(world)
    assert {node.micro_batch for node in world.devices.values()} == {1}

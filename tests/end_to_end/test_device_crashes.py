"""Devices die, freeze and come back in the middle of a run."""

from __future__ import annotations

import json
import signal
import time
from itertools import pairwise

from fedzo.broker_server.journal import Entry
from tests.end_to_end.conftest import Finished, MakeFleet
from tests.end_to_end.fleet import Fleet, agree, wait_for

RIGS = ("computing:2", "saved:4", "received:5")
DEADLINE_S = 200.0
LONG = ("--rounds", 100, "--k", 24, "--evaluate-every", 0)


def rounds_of(fleet: Fleet, device: str) -> set[int]:
    return {entry.round for entry in fleet.entries("report") if entry.device == device}


def test_a_round_waits_for_killed_devices_and_ends_as_if_nothing_had_happened(
    undisturbed: Finished, fleets: MakeFleet
) -> None:
    """With a quorum of all: one dies while it computes, one before it sends, one before it forgets."""
    fleet = fleets()
    server = fleet.serve()
    boards = [fleet.device(number, rig=rig) for number, rig in enumerate(RIGS)]
    again = []
    for number, board in enumerate(boards):
        assert board.wait() == -signal.SIGKILL, (board.name, board.stderr)
        again.append(fleet.device(number))
    answer, answers = server.answer(), [board.answer() for board in again]
    assert agree(answer, answers) == undisturbed.digest
    assert (answer["reports"], answer["refused"]) == (undisturbed.server["reports"], 0)
    # A report that is on the disk is sent again, not made again.
    made = {device["device"]: device["reports"] for device in answers}
    all_rounds = undisturbed.server["reports"] // 3
    assert (made["board-1"], made["board-2"]) == (all_rounds - 4, all_rounds - 5)


def test_the_run_goes_on_without_a_killed_device_which_catches_up(fleets: MakeFleet) -> None:
    fleet = fleets()
    server = fleet.serve("--quorum", 2, "--deadline", DEADLINE_S, *LONG)
    others = [fleet.device(1), fleet.device(2)]
    dying = fleet.device(0, rig="computing:5")
    assert dying.wait() == -signal.SIGKILL
    before = rounds_of(fleet, "board-0")
    updates = len(fleet.entries("update"))
    fleet.await_entries("update", updates + 3)
    assert rounds_of(fleet, "board-0") == before
    others[0].signal(signal.SIGSTOP)  # So the run cannot end before the device is back.
    again = fleet.device(0)
    again.until("run small fits")
    others[0].signal(signal.SIGCONT)
    answer = server.answer()
    agree(answer, [device.answer() for device in (again, *others)])
    assert answer["refused"] == 0
    after = rounds_of(fleet, "board-0") - before
    first, every = min(after), rounds_of(fleet, "board-1")
    assert any(max(before) < number < first for number in every)
    # From its return on it took part in every round.
    assert after == {number for number in every if number >= first}
    assert answer["wall_s"] < DEADLINE_S  # no deadline was waited for: the broker told of the death at once


def test_a_round_closes_at_its_deadline_without_a_frozen_device(fleets: MakeFleet) -> None:
    fleet = fleets()
    server = fleet.serve("--quorum", 2, "--deadline", 3, *LONG)
    fleet.devices()
    fleet.await_entries("update", 5)
    fleet.boards[0].signal(signal.SIGSTOP)
    frozen = time.time()
    wait_for(lambda: quiet(fleet.entries("update")) > 2.5, "the deadline of a round", logs=fleet.logs)
    after = len([entry for entry in fleet.entries("update") if entry.at > frozen])
    fleet.await_entries("update", after + 2)
    fleet.boards[0].signal(signal.SIGCONT)
    answer = server.answer()
    agree(answer, [device.answer() for device in fleet.boards])
    # One round was waited for (or a few, if this machine was busy elsewhere), not every one.
    gaps = [late.at - early.at for early, late in pairwise(fleet.entries("update"))]
    assert 1 <= len([gap for gap in gaps if gap > 2.5]) <= 5
    missed = rounds_of(fleet, "board-1") - rounds_of(fleet, "board-0")
    assert missed
    # It was left out until it was heard of again, and then no longer.
    assert max(rounds_of(fleet, "board-0")) > max(missed)


def quiet(entries: list[Entry]) -> float:
    """The longest time between two entries."""
    return max((late.at - early.at for early, late in pairwise(entries)), default=0.0)


def test_a_run_ends_without_a_device_that_never_returns(fleets: MakeFleet) -> None:
    fleet = fleets()
    server = fleet.serve("--quorum", 2, "--deadline", DEADLINE_S)
    others = [fleet.device(1), fleet.device(2)]
    assert fleet.device(0, rig="computing:3").wait() == -signal.SIGKILL
    answer = server.answer()  # in less time than the deadline
    assert {device.answer()["weights_digest"] for device in others} == {answer["weights_digest"]}
    assert answer["phase"] == "done"
    assert answer["rounds"] == 6
    assert answer["digests_agree"] is None  # one of three did not say so


def test_a_device_that_leaves_is_not_waited_for(fleets: MakeFleet) -> None:
    fleet = fleets()
    server = fleet.serve("--quorum", 2, "--deadline", DEADLINE_S, *LONG)
    fleet.devices()
    fleet.await_entries("update", 5)
    leaving = fleet.boards[0]
    leaving.signal(signal.SIGTERM)
    left = leaving.answer()
    assert left["status"] == "left"
    answer = server.answer()  # in less time than the deadline
    assert (answer["phase"], answer["rounds"]) == ("done", 100)
    assert json.loads(leaving.stdout)["log_length"] < 100

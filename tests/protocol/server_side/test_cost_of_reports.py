"""What a report costs the coordinator does not depend on how many devices there are."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest

from fedzo.protocol.server_side.coordinator_events import CoordinatorCommand, DeviceSaid, Evaluate, Record, Send
from fedzo.protocol.wire.messages import Receipt, Report
from fedzo.protocol.wire.topics import Channel
from tests.protocol.simulation.desk import SETTINGS, Desk, change


def steps(desk: Desk, name: str, report: Report) -> tuple[int, list[CoordinatorCommand]]:
    """Functions called, and steps of generators taken, for one report; and what came out."""
    count = 0

    def look(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(look)
    try:
        commands = desk.machine.on(DeviceSaid(name, Channel.REPORT, report), desk.now)
    finally:
        sys.setprofile(None)
    return count, commands


def open_round(n: int, phase: str) -> tuple[Desk, list[str], Report]:
    """A round of many devices, of which a few have answered, and what all of them say."""
    rounds = 1 if phase == "evaluate" else 3
    settings = change(SETTINGS, rounds=rounds, assignment="shared", devices=n, quorum=n)
    names = [f"d-{number:04d}" for number in range(n)]
    desk = Desk(settings, has_test_set=True).connect().join(*names)
    if phase == "evaluate":
        report = desk.measure(names[0])
        for name in names:
            desk.say(name, report, Channel.REPORT)
    assert desk.head.phase == phase
    report = desk.measure(names[0])
    for name in names[:5]:
        desk.say(name, report, Channel.REPORT)
    return desk, names, report


@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_a_report_takes_as_many_steps_whatever_the_number_of_devices(phase: str) -> None:
    taken = {}
    for n in (30, 600):
        desk, names, report = open_round(n, phase)
        counts = []
        for name in names[5:15]:
            count, commands = steps(desk, name, report)
            counts.append(count)
            assert [type(command) for command in commands] == [Record, Send]
            assert isinstance(commands[1], Send)
            assert isinstance(commands[1].message, Receipt)
        taken[n] = sorted(counts)[5]
    assert taken[600] <= taken[30] + 5


def test_lost_participants_are_not_looked_at_for_every_report() -> None:
    taken = {}
    for n in (40, 400):
        desk, names, report = open_round(n, "train")
        desk.presence(*names[5 : n // 2], status="lost").presence(*names[-3:], status="lost")
        counts = [steps(desk, name, report)[0] for name in names[n // 2 : n // 2 + 9]]
        taken[n] = sorted(counts)[5]
        assert desk.head.phase == "train"
    assert taken[400] <= taken[40] + 5


def test_an_evaluation_is_asked_for_once_and_again_after_a_break_of_the_link() -> None:
    """It comes with a copy of the weights: thousands of them would not fit the memory."""
    desk, _, _ = open_round(30, "evaluate")
    assert sum(isinstance(command, Evaluate) for command in desk.trace) == 1
    desk.connect()
    assert sum(isinstance(command, Evaluate) for command in desk.trace) == 2

"""Random schedules against both state machines: nothing is lost, nothing counts twice, nothing stands still.

``FEDZO_SCHEDULES`` is how many are played; without it, as many as fit into :data:`BOX_S` seconds. A schedule is a
function of its number, and ``python -m tests.protocol.exactly_once`` plays more of them, on several processors.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from fedzo.protocol.device_side.delivery import Delivery
from fedzo.protocol.device_side.log_follower import LogFollower
from fedzo.protocol.server_side.coordinator import Coordinator
from fedzo.protocol.server_side.coordinator_events import CoordinatorCommand, CoordinatorEvent, Send
from fedzo.protocol.server_side.open_round import OpenRound
from fedzo.protocol.server_side.roster import Roster
from fedzo.protocol.wire.messages import Receipt, UpdateRecord, Verdict
from tests.protocol.exactly_once.plans import FEATURES, plan_of
from tests.protocol.exactly_once.world import play

COUNT = int(os.environ.get("FEDZO_SCHEDULES", "0"))
BOX_S = 40.0


@pytest.mark.timeout(max(300, COUNT))
def test_schedules(record_property: Callable[[str, object], None]) -> None:
    started, number = time.monotonic(), 0
    while number < COUNT or (not COUNT and time.monotonic() - started < BOX_S):
        try:
            play(number)
        except Exception as error:
            raise AssertionError(f"schedule {number}") from error
        number += 1
    record_property("schedules", number)
    assert number > 0


def test_a_schedule_is_a_function_of_its_number() -> None:
    first, again = play(5), play(5)
    assert first.server.entries() == again.server.entries()
    assert first.steps == again.steps
    assert first.server.entries() != play(6).server.entries()


def test_every_row_of_the_table_is_drawn() -> None:
    plans = [plan_of(number) for number in range(400)]
    drawn = Counter(feature for plan in plans for feature in plan.features)
    assert drawn.keys() == FEATURES.keys()
    assert {board.answers for plan in plans for board in plan.boards} == {"honest", "wrong", "hostile", "declines"}
    assert {plan.settings.staleness > 0 for plan in plans} == {True, False}
    assert {plan.settings.close_at > 0 for plan in plans} == {True, False}
    assert {plan.settings.training.k_min > 0 for plan in plans} == {True, False}


def test_storms_are_storms() -> None:
    """The faults do what they are there for: reports come twice and late, servers and boards start again."""
    seen: Counter[str] = Counter()
    for number in range(60):
        world = play(number)
        seen.update(world.server.counts)
        seen["starts of a server"] += world.server.lives - 1
        seen["starts of a board"] += sum(node.session - 1 for node in world.devices)
        seen["stops"] += world.server.stops
        seen["snapshots"] += len(world.server.journal.sequences("snapshot"))
        seen["late reports that count"] += sum(
            index >= 0 and world.server.updates[index].round != round_
            for (round_, _), index in world.ledger.counted.items()
        )
    for what in ("accepted", "duplicate", "late", "refused", "starts of a server", "starts of a board", "stops"):
        assert seen[what] >= 10, f"{what}: {seen}"
    assert seen["snapshots"] >= 5, seen
    assert seen["late reports that count"] >= 1, seen


# --- machines with a mistake ----------------------------------------------------------------------------------------


def _forgets_who_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report that is sent again counts again."""
    take = OpenRound.take

    def forgetful(self: OpenRound, device: str, *rest: Any) -> tuple[Verdict, str]:
        self.reports.pop(device, None)
        return take(self, device, *rest)

    monkeypatch.setattr(OpenRound, "take", forgetful)


def _says_accepted_to_what_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    on = Coordinator.on

    def generous(self: Coordinator, event: CoordinatorEvent, now: float) -> list[CoordinatorCommand]:
        def kind(command: CoordinatorCommand) -> CoordinatorCommand:
            if isinstance(command, Send) and isinstance(command.message, Receipt):
                message = command.message
                if message.verdict is Verdict.LATE:
                    return Send(
                        command.channel, Receipt(message.run_tag, message.round, Verdict.ACCEPTED), command.device
                    )
            return command

        return [kind(command) for command in on(self, event, now)]

    monkeypatch.setattr(Coordinator, "on", generous)


def _takes_any_receipt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A board empties its outbox for a receipt of an earlier round."""

    def careless(self: Delivery, receipt: Receipt) -> list[Any]:
        if self._outbox is None:
            return []
        self.answered = max(self.answered, self._outbox[1].round)
        return self._drop()

    monkeypatch.setattr(Delivery, "take", careless)


def _closes_one_below_the_quorum(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: property = vars(OpenRound)["n_counted"]
    monkeypatch.setattr(OpenRound, "n_counted", property(lambda self: counted.__get__(self) + 1))


def _hears_every_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """A board applies whatever update comes."""

    def careless(self: LogFollower, record: UpdateRecord) -> None:
        self._apply(record)

    monkeypatch.setattr(LogFollower, "hear", careless)


def _uses_scores_that_were_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = OpenRound.judge

    def careless(self: OpenRound, device: str, difference: float) -> str | None:
        report, usable = self.reports.get(device), self.n_usable
        reason = judge(self, device, difference)
        if reason is not None and report is not None:
            self.reports[device], self.n_usable = report, usable
        return reason

    monkeypatch.setattr(OpenRound, "judge", careless)


def _ends_without_who_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty(self: Roster, _packed: str) -> bool:
        return all(member.status == "done" or not member.is_alive for member in self.members.values())

    monkeypatch.setattr(Roster, "is_done", hasty)


@pytest.mark.parametrize(
    "mistake",
    [
        _forgets_who_reported,
        _says_accepted_to_what_is_late,
        _takes_any_receipt,
        _closes_one_below_the_quorum,
        _hears_every_update,
        _uses_scores_that_were_refused,
        _ends_without_who_was_lost,
    ],
)
def test_a_mistake_is_found(mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks can fail: each of these machines is caught by some schedule."""
    mistake(monkeypatch)
    about_scores = mistake is _uses_scores_that_were_refused
    for number in range(20_000 if about_scores else 1000):
        plan = plan_of(number)
        if about_scores and not (plan.settings.saliency.checked and any(b.answers == "wrong" for b in plan.boards)):
            continue
        try:
            play(number)
        except (AttributeError, NameError, TypeError):
            raise  # the mistake does not fit the machine any more
        except Exception:  # noqa: BLE001 (an assertion, or what the journal or a machine raises)
            return
    pytest.fail("no schedule has found it")

"""Residual and outbox are one step: wherever a device dies, what a report carried counts once or comes back."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fedzo.edge_runtime.storage.outbox import Outbox
from fedzo.edge_runtime.storage.residual_file import Residual, carried_by, residual_key
from fedzo.edge_runtime.storage.state import DeviceState
from fedzo.protocol.device_side.delivery import Delivery
from fedzo.protocol.device_side.device_events import DropReport, GiveBack, SaveReport
from fedzo.protocol.settings import RunSettings, TrainingSettings
from fedzo.protocol.wire.documents import RunDocument
from fedzo.protocol.wire.messages import Decline, Receipt, Report, ReportKind, Verdict

RUN = RunDocument("run-1", "ab" * 32, 1_000, RunSettings(training=TrainingSettings(estimator="node")))
KEY = residual_key(RUN, "cd")
BEFORE = np.array([1.0, -2.0, 4.0, 0.5], np.float32)
GRADIENT = np.array([0.25, 8.0, -1.0, 2.0], np.float32)
PLACES = np.array([1, 3])
ROUND = 7
RECENT = ((4, 6), (5, ROUND))  # the round made an update, with this report or without it
CARRIED = np.zeros(4, np.float32)
CARRIED[PLACES] = (BEFORE + GRADIENT)[PLACES]


class _KilledError(Exception):
    pass


class Board:
    """What a device does with its disk in a round, up to the write before which it is killed."""

    def __init__(self, folder: Path, writes: float, order: str = "") -> None:
        self.order = order
        self.state = DeviceState(folder, federation="default", device="board-1")
        self.writes_left = writes
        self.delivery = Delivery(self.state.outbox.load(), retry_s=1.0)
        self.residual: Residual | None = None

    def write(self, action: Callable[[], object]) -> None:
        if self.writes_left < 1:
            raise _KilledError
        self.writes_left -= 1
        action()

    def measure(self) -> None:
        """As the worker does."""
        after = BEFORE + GRADIENT - CARRIED
        carried = carried_by([PLACES], [CARRIED[PLACES]])
        self.keep(Residual(KEY, ROUND, BEFORE.tobytes(), after.tobytes(), 5, carried))

    def keep(self, residual: Residual) -> None:
        self.residual = residual
        self.write(lambda: self.state.residuals.save(residual))

    def carry_out(self, commands: list[object]) -> None:
        """As the agent does, and the worker for what goes back, which may be busy until then."""
        if self.order == "busy worker":
            commands = sorted(commands, key=lambda command: isinstance(command, GiveBack))
        for command in commands:
            if isinstance(command, SaveReport):
                self.write(lambda: self.state.outbox.save(command.run, command.report))  # noqa: B023 (called at once)
            elif isinstance(command, DropReport):
                self.write(lambda: self.state.outbox.drop(is_lost=command.is_lost))  # noqa: B023
            elif isinstance(command, GiveBack) and self.residual is not None:
                self.keep(dataclasses.replace(self.residual, is_lost=True))

    def restarted(self) -> None:
        self.residual = self.state.residuals.load(KEY, RUN.run)


def report(kind: ReportKind = ReportKind.PROBE, round_: int = ROUND, *, declines: bool = False) -> Report:
    blocks = () if declines else (CARRIED[PLACES],)
    decline = Decline.FAILED if declines else Decline.NONE
    return Report(kind, RUN.tag, round_, 3, 16, bytes(16), 2.25, 6, 40, 70_000, blocks, decline)


def earlier_round(board: Board) -> None:
    """A round whose report counted."""
    board.write(lambda: board.state.residuals.save(Residual(KEY, ROUND - 1, b"", BEFORE.tobytes(), 4)))
    board.carry_out([SaveReport(RUN.run, report(round_=ROUND - 1)), DropReport()])


FATES = ("accepted", "duplicate", "late", "refused", "declines", "unwanted", "never answered")


def receipt_of(fate: str) -> Receipt:
    verdict = {"declines": "accepted", "never answered": "accepted"}.get(fate, fate)
    return Receipt(RUN.tag, ROUND, Verdict[verdict.upper()])


def live(board: Board, fate: str) -> Iterator[str]:
    """One round, with what the server sees of it."""
    board.delivery.start_run(RUN)
    board.measure()
    yield "measured"
    if fate == "unwanted":
        board.carry_out([*board.delivery.give_back(ReportKind.PROBE, ROUND)])
        return
    board.carry_out([*board.delivery.put(RUN, report(declines=fate == "declines"))])
    yield "sent"
    if fate == "never answered":
        board.carry_out([*board.delivery._drop()])
    else:
        board.carry_out([*board.delivery.take(receipt_of(fate))])


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("writes", range(6))
@pytest.mark.parametrize("order", ["", "busy worker", "receipt first"])
def test_wherever_a_device_dies_what_it_carried_counts_once_or_comes_back(
    fate: str, writes: int, order: str, tmp_path: Path
) -> None:
    """Residual and carried scalars together are what the round before and the gradient were, as far as it was kept."""
    board = Board(tmp_path, 3, order)
    earlier_round(board)
    seen: list[str] = []
    board.writes_left = writes
    with contextlib.suppress(_KilledError):
        seen += live(board, fate)
    is_measured = writes > 0
    was_sent = "sent" in seen
    board.state.close()

    again = Board(tmp_path, np.inf, order)
    waits = again.delivery.is_waiting
    assert waits or not was_sent or writes > 2  # sent again until its fate is known
    # The receipt may come before the run, and before an engine is there.
    steps: list[Callable[[], object]] = [lambda: again.delivery.start_run(RUN), again.restarted]
    if waits:
        take = lambda: again.carry_out([*again.delivery.take(receipt_of(fate))])  # noqa: E731
        steps.insert(0 if order == "receipt first" else 2, take)
    for step in steps:
        step()
    counts = (was_sent or waits) and fate in ("accepted", "duplicate", "never answered")
    expected = BEFORE if not is_measured else BEFORE + GRADIENT - (CARRIED if counts else 0)
    for _ in range(2):  # also when it is killed once more
        assert again.residual is not None
        found = np.frombuffer(again.residual.state_for(ROUND + 1, 6, RECENT), "<f4")
        assert found.tolist() == expected.tolist()
        # The round itself begins where it began.
        assert np.frombuffer(again.residual.state_for(ROUND, 6, RECENT), "<f4").tolist() == BEFORE.tolist()
        # A report of another kind, of a later round, says nothing of this one.
        again.carry_out([SaveReport(RUN.run, report(ReportKind.EVALUATE, ROUND + 1)), DropReport()])
        again.restarted()
    again.state.close()


@pytest.mark.parametrize("is_lost", [False, True])
def test_what_became_of_a_report_is_one_step(tmp_path: Path, is_lost: bool) -> None:
    outbox = Outbox(tmp_path / "outbox")
    assert not outbox.may_count("run-1", ROUND)
    outbox.save("run-1", report())
    assert outbox.may_count("run-1", ROUND)
    assert not outbox.may_count("run-2", ROUND)
    assert not outbox.may_count("run-1", ROUND + 1)
    outbox.drop(is_lost=is_lost)
    assert outbox.load() is None
    assert outbox.may_count("run-1", ROUND) is not is_lost


@pytest.mark.parametrize("name", ["outbox", "outbox.sent"])
def test_of_a_damaged_report_nobody_knows_whether_it_counts(tmp_path: Path, name: str) -> None:
    outbox = Outbox(tmp_path / "outbox")
    (tmp_path / name).write_bytes(b"FZO1 damaged")
    assert outbox.may_count("run-1", ROUND)
    outbox.load()
    assert outbox.may_count("run-1", ROUND)

"""One coordinator on a desk: a script plays the devices, one event at a time."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedzo.protocol.device_side.device_events import Outcome, Task
from fedzo.protocol.device_side.tasks import make_report
from fedzo.protocol.perturbation.dealing import deals_of
from fedzo.protocol.server_side.coordinator import Coordinator
from fedzo.protocol.server_side.coordinator_events import (
    CheckScores,
    Connected,
    CoordinatorCommand,
    CoordinatorEvent,
    DeviceSaid,
    Evaluate,
    Finish,
    OfferBlob,
    Record,
    ScoresChecked,
    Send,
    ServerEvaluated,
    Tick,
)
from fedzo.protocol.settings import RunSettings, SaliencySettings, TrainingSettings
from fedzo.protocol.wire.codec import BinaryMessage
from fedzo.protocol.wire.documents import Announcement, Document, Hello, Order, Presence, Status, parse
from fedzo.protocol.wire.messages import KINDS, Decline, Receipt, Report, ReportKind, UpdateRecord, Verdict
from fedzo.protocol.wire.topics import Channel
from tests.protocol.simulation.fakes import FakeEngine, manifest_for, run_document
from tests.protocol.simulation.nodes import Entry

NAMES = ("a", "b", "c", "d")
SETTINGS = RunSettings(
    seed=4,
    sparsity=0.0,
    saliency=SaliencySettings(samples=8),
    training=TrainingSettings(rounds=3, k=2, learning_rate=0.05),
    devices=4,
    quorum=2,
    deadline_s=10.0,
    enrol_deadline_s=30.0,
    patience=3,
    evaluate_every=0,
)
_Message = TypeVar("_Message")


def change(settings: RunSettings, **changes: Any) -> RunSettings:
    """Settings with changes; those of the training are found by their names."""
    inner = {name: changes.pop(name) for name in list(changes) if hasattr(settings.training, name)}
    return dataclasses.replace(settings, training=dataclasses.replace(settings.training, **inner), **changes)


class Desk:
    """Drives one coordinator.

    Args:
        settings: Of the run.
        journal: What an earlier life left.
        has_test_set: Whether the server evaluates.

    Attributes:
        machine: The coordinator.
        now: What the clock shows.
        journal: Everything recorded, in all lives.
        trace: Everything that came out in this life.
        out: Commands of the last event, and of the answers to checks of scores.
        differences: By device, how far its scores are from those that the server computes; None for no answer.
    """

    def __init__(
        self, settings: RunSettings = SETTINGS, *, journal: list[Entry] | None = None, has_test_set: bool = False
    ) -> None:
        self.settings = settings
        self.now = 50.0
        self.journal = list(journal or [])
        manifest = manifest_for(settings.training.estimator)
        self.machine = Coordinator(run_document(settings), manifest, birth=1, has_test_set=has_test_set)
        self.trace: list[CoordinatorCommand] = list(self.machine.restore(self.journal))
        self.out: list[CoordinatorCommand] = []
        self.sessions = dict.fromkeys(NAMES, 1)
        self.micro_batches: dict[str, int] = {}
        self.differences: dict[str, float | None] = {}

    # --- events ---------------------------------------------------------------------------------------------------

    def on(self, event: CoordinatorEvent) -> list[CoordinatorCommand]:
        """One event."""
        self.out = self.machine.on(event, self.now)
        for check in [c for c in self.out if isinstance(c, CheckScores)]:
            if (difference := self.differences.get(check.device, 0.0)) is not None:
                self.out = self.out + self.machine.on(ScoresChecked(check.round, check.device, difference), self.now)
        self.trace += self.out
        self.journal += [(c.kind, c.round, c.device, c.payload) for c in self.out if isinstance(c, Record)]
        wakeup = self.machine.wakeup
        assert wakeup is None or wakeup > self.now
        return self.out

    def connect(self) -> Desk:
        """The link comes up."""
        self.on(Connected())
        return self

    def say(self, name: str, message: Document | BinaryMessage, channel: Channel = Channel.GET) -> None:
        """A device says something."""
        self.on(DeviceSaid(name, channel, message))

    def hello(self, *names: str) -> Desk:
        """Devices introduce themselves."""
        for name in names:
            hello = Hello(self.sessions.setdefault(name, 1), "desk", 64.0, 10, 5, "none", "none")
            self.say(name, hello, Channel.HELLO)
        return self

    def presence(self, *names: str, status: Status = "ready", **changes: Any) -> Desk:
        """Devices say how they are."""
        for name in names:
            fields: dict[str, Any] = {
                "session": self.sessions.setdefault(name, 1),
                "run": "run-1",
                "micro_batch": self.micro_batches.get(name, 8),
            } | changes
            self.say(name, Presence(status=status, **fields), Channel.STATE)
        return self

    def join(self, *names: str) -> Desk:
        """Devices join and get ready; all four by default."""
        names = names or NAMES
        return self.hello(*names).presence(*names)

    def wait(self, seconds: float) -> None:
        """Let time pass, with a Tick whenever one is due."""
        end = self.now + seconds
        while (wakeup := self.machine.wakeup) is not None and wakeup <= end:
            self.now = wakeup
            self.on(Tick())
        self.now = end

    def report(self, *names: str, **changes: Any) -> list[Verdict]:
        """Devices report on the open round as their engines would, with changes; gives the verdicts."""
        verdicts = []
        for name in names or self.waiting():
            self.say(name, self.measure(name, **changes), Channel.REPORT)
            (receipt,) = self.sent(Receipt)
            verdicts.append(receipt.verdict)
        return verdicts

    def decline(self, *names: str, why: Decline = Decline.NON_FINITE) -> None:
        """Devices report that they cannot."""
        self.report(*names, blocks=(), decline=why)

    def measure(self, name: str, **changes: Any) -> Report:
        """A device's honest report on the open round, with changes."""
        head, machine, run = self.head, self.machine, self.machine.run
        kind = KINDS[head.phase]
        ranks = {member: rank for rank, member in enumerate(self.participants())}
        positions: tuple[NDArray[np.int64], ...] = ()
        if kind is ReportKind.PROBE:
            deals = deals_of(run.settings, machine.replica.blocks, head)
            positions = tuple(one.positions(one.slot(ranks.get(name, 0))) for one in deals)
        weights, digest = machine.replica.weights.copy(), machine.replica.digest
        if kind is ReportKind.EVALUATE:
            weights, digest = machine.replica.evaluated()
        task = Task(1, kind, head.round, 0, positions, weights, digest, head.sigma)
        report = make_report(
            run, task, self.answer(name, task), self.sessions.get(name, 1), self.micro_batches.get(name, 8)
        )
        return dataclasses.replace(report, **changes)

    def answer(self, name: str, task: Task) -> Outcome:
        """What the engine of a device makes of a task."""
        return FakeEngine(name).answer(self.machine.run, self.machine.mask, task)

    def play(self, *names: str) -> Desk:
        """Rounds in which everybody reports, to the end."""
        for _ in range(100):
            if self.machine.finished:
                break
            if self.head.phase == "done":
                self.presence(*(names or NAMES), status="done", weights_digest=self.machine.replica.digest.hex())
            else:
                self.report(*(names or self.waiting()))
        return self

    def evaluate(self, **changes: Any) -> None:
        """The server's own evaluation is done."""
        self.on(
            ServerEvaluated(**({"round": self.head.round, "mean_loss": 0.5, "accuracy": 0.75, "samples": 8} | changes))
        )

    # --- what came out --------------------------------------------------------------------------------------------

    @property
    def head(self) -> Announcement:
        """What is announced now."""
        return self.machine.head

    def participants(self) -> list[str]:
        """Of the announced round, in the order of ordinals."""
        return list(self.machine.roster.names_of(self.head.participants))

    def waiting(self) -> list[str]:
        """Participants that have not reported."""
        done = {device for kind, round_, device, _ in self.journal if kind == "report" and round_ == self.head.round}
        return [name for name in self.participants() if name not in done]

    def sent(self, kind: type[_Message]) -> list[_Message]:
        """Published messages of a kind, of the last event."""
        return [c.message for c in self.out if isinstance(c, Send) and isinstance(c.message, kind)]

    def orders(self, name: str) -> list[Order]:
        """Orders to a device in this life."""
        return [
            c.message for c in self.trace if isinstance(c, Send) and isinstance(c.message, Order) and c.device == name
        ]

    def kinds(self) -> list[str]:
        """Kinds of the journal's entries."""
        return [kind for kind, _, _, _ in self.journal]

    def phases(self) -> list[str]:
        """Phases announced so far."""
        return [parse(Announcement, payload).phase for kind, _, _, payload in self.journal if kind == "announce"]

    def finish(self) -> Finish:
        """The end of the last event."""
        (found,) = [c for c in self.out if isinstance(c, Finish)]
        return found

    def asked_to_evaluate(self) -> list[Evaluate]:
        """What the last event asked of the server's engine."""
        return [c for c in self.out if isinstance(c, Evaluate)]


def check_order(commands: list[CoordinatorCommand], journal: list[Entry] | None = None) -> None:
    """Nothing is said before what it depends on is recorded.

    Args:
        commands: In the order in which they were carried out.
        journal: What was recorded before.
    """
    recorded: set[tuple[str, int, str]] = set()
    payloads: set[bytes] = set()

    def note(kind: str, round_: int, device: str, payload: bytes) -> None:
        recorded.add((kind, round_, device))
        payloads.add(payload)

    for entry in journal or ():
        note(*entry)
    for command in commands:
        if isinstance(command, Record):
            note(command.kind, command.round, command.device, command.payload)
        elif isinstance(command, OfferBlob):
            # A snapshot is not recorded as such: it follows from the log.
            assert command.data in payloads or command.data.startswith(b"FZS1")
        elif isinstance(command, Send):
            message = command.message
            if isinstance(message, UpdateRecord) or (isinstance(message, Announcement) and message.round > 0):
                assert message.encode() in payloads
            elif isinstance(message, Order) and message.action != "refuse":
                assert any(kind == "enrolment" and device == command.device for kind, _, device in recorded)
                assert message.action == "enrol" or any(kind == "announce" for kind, _, _ in recorded)
            elif isinstance(message, Receipt) and message.verdict in (Verdict.ACCEPTED, Verdict.DUPLICATE):
                assert ("report", message.round, command.device) in recorded
            elif isinstance(message, Receipt) and message.verdict is Verdict.REFUSED:
                assert ("refusal", message.round, command.device) in recorded

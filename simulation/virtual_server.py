"""The shell around the coordinator's machine: what :mod:`fedzo.broker_server.server` is to a run, without a journal."""

from __future__ import annotations

from collections.abc import Callable

from ..broker_server.blobs import BlobServer
from ..broker_server.log_slices import log_slice
from ..broker_server.server_passes import ServerPasses
from ..edge_runtime.storage.artifact import Artifact
from ..protocol.errors import FedzoError
from ..protocol.server_side import coordinator_events as machine
from ..protocol.server_side.coordinator import Coordinator
from ..protocol.wire.messages import Decline, Receipt, Report, ReportKind, Verdict
from ..protocol.wire.participants import unpack_participants
from ..protocol.wire.topics import Channel
from .clock import Clock
from .labour import Labour
from .result import CurveRow, Progress, RoundRow
from .wires import Wires

__all__ = ["VirtualServer"]


class VirtualServer:
    """Serves one run.

    Args:
        coordinator: Its machine.
        artifact: Of the run.
        blobs: What devices may pull.
        wires: The broker.
        clock: Virtual time.
        labour: Who evaluates.
        n_test: Size of the server's own test set.
        on_phase: Called with the phase of every announcement, before it is sent, and with ``trained`` at the last
            update.
        on_progress: Called after every update and evaluation.

    Attributes:
        rounds: Rounds of training.
        curve: Evaluations.
        finished: Whether the run is over.
        error: Why, if it is an error.
        refusal: Why the first report that was refused was.
        scalars: Scalars that count.
        reports: Reports of training that count.
        queries: Forward passes behind them.
        asked: Participants of rounds of training, summed.
        connected: Devices with a link at rounds of training, summed.
        declined: Reports without scalars.
        late: Reports after their round.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        artifact: Artifact,
        blobs: BlobServer,
        wires: Wires,
        clock: Clock,
        labour: Labour,
        n_test: int,
        on_phase: Callable[[str], None],
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.coordinator = coordinator
        self._artifact, self._blobs, self._wires, self._clock, self._labour = artifact, blobs, wires, clock, labour
        self._n_test, self._on_phase, self._on_progress = n_test, on_phase, on_progress
        self._log: list[bytes] = []
        self._tick_at: float | None = None
        self._open: list[Report] = []
        self._participants = 0
        self._is_evaluating = -1
        self._is_making_mask = False
        self.rounds: list[RoundRow] = []
        self.curve: list[CurveRow] = []
        self.finished = False
        self.error: FedzoError | None = None
        self.refusal = ""
        self.scalars = self.reports = self.queries = self.asked = self.connected = self.declined = self.late = 0

    def on(self, event: machine.CoordinatorEvent) -> None:
        """Give an event to the machine, and carry out what it wants."""
        for command in self.coordinator.on(event, self._clock.now):
            self._carry_out(command, event)
        wakeup = self.coordinator.wakeup
        if wakeup is not None and wakeup != self._tick_at:
            self._tick_at = wakeup
            self._clock.at(wakeup, self._tick, wakeup)

    def _tick(self, due: float) -> None:
        if self._tick_at == due and not self.finished:
            self._tick_at = None
            self.on(machine.Tick())

    def _carry_out(self, command: machine.CoordinatorCommand, event: machine.CoordinatorEvent) -> None:
        if isinstance(command, machine.Record):
            self._note(command, event)
        elif isinstance(command, machine.Send):
            if isinstance(command.message, Receipt):
                self.late += command.message.verdict is Verdict.LATE
            self._wires.to_devices(command.channel, command.message, command.device)
            if command.channel is Channel.HEAD:
                for device in self._wires.devices:
                    if device.is_away:
                        self._clock.at(self._clock.now, device.connect)
        elif isinstance(command, machine.OfferBlob):
            self._blobs.offer(command.sha256, command.data)
        elif isinstance(command, machine.WithdrawBlob):
            self._blobs.withdraw(command.sha256)
        elif isinstance(command, machine.ServeBlob):
            block = self._blobs.block(command.request)
            if block is not None:
                self._wires.to_devices(Channel.BLOCK, block, command.device)
        elif isinstance(command, machine.ServeLog):
            part = log_slice(command.request, len(self._log), self._log.__getitem__)
            if part is not None:
                self._wires.to_devices(Channel.BLOCK, part, command.device)
        elif isinstance(command, machine.Evaluate):
            self._evaluate(command)
        elif isinstance(command, machine.CheckScores):
            # The devices computed with the very engine that would check them.
            self._clock.at(self._clock.now, self.on, machine.ScoresChecked(command.round, command.device, 0.0))
        elif isinstance(command, machine.MakeMask):
            if not self._is_making_mask:
                self._is_making_mask = True
                answer = ServerPasses(self._artifact, self.coordinator.run).answer(command)
                assert answer is not None, "nothing cancels it"
                self._clock.at(self._clock.now, self.on, answer)
        else:
            self.finished, self.error = True, command.error

    def _evaluate(self, command: machine.Evaluate) -> None:
        if self._is_evaluating == command.round:
            return
        self._is_evaluating = command.round
        loss, correct, count = self._labour.evaluate(command.mask, command.weights, self._n_test)
        done = machine.ServerEvaluated(command.round, loss / count, correct / count, count)
        self._clock.at(self._clock.now, self.on, done)

    # --- what it comes to -------------------------------------------------------------------------------------------

    def _note(self, record: machine.Record, event: machine.CoordinatorEvent) -> None:
        if record.kind == "announce":
            head = self.coordinator.head
            self._wires.is_training = head.phase == "train"
            self._on_phase(head.phase)
            self._participants = unpack_participants(head.participants).size
            # What is late waits for the next update; what a round that came to nothing had is lost.
            self._open = [report for report in self._open if report.round < head.round - 1]
        elif record.kind == "report" and isinstance(event, machine.DeviceSaid) and isinstance(event.message, Report):
            self.declined += event.message.decline not in (Decline.NONE, Decline.NO_DATA)
            if event.message.kind is ReportKind.PROBE and event.message.blocks:
                self._open.append(event.message)
        elif record.kind == "refusal":
            self.refusal = self.refusal or record.payload.decode()
        elif record.kind == "update":
            self._log.append(record.payload)
            self._updated()
        elif record.kind == "evaluation":
            self._evaluated()

    def _updated(self) -> None:
        reports, self._open = self._open, []
        self.reports += len(reports)
        self.scalars += sum(block.size for report in reports for block in report.blocks)
        self.queries += sum(report.queries for report in reports)
        self.asked += self._participants
        self.connected += sum(device.online for device in self._wires.devices)
        row = RoundRow(
            round=len(self._log),
            participants=self._participants,
            reports=len(reports),
            mean_loss=sum(report.mean_loss for report in reports) / max(1, len(reports)),
            sample_forwards=self._labour.sample_forwards,
            virtual_s=self._clock.now,
        )
        self.rounds.append(row)
        if row.round == self.coordinator.run.training.rounds:
            self._on_phase("trained")
        self._report()

    def _evaluated(self) -> None:
        found = self.coordinator.evaluations[-1]

        def number(name: str) -> float | None:
            value = found[name]
            return None if value is None else float(value)

        self.curve.append(
            CurveRow(
                round=int(found["log_length"] or 0),
                sample_forwards=self._labour.sample_forwards,
                mean_loss=self.rounds[-1].mean_loss if self.rounds else None,
                test_accuracy=number("server_accuracy"),
                test_loss=number("server_loss"),
                device_accuracy=number("accuracy"),
                virtual_s=self._clock.now,
            )
        )
        self._report()

    def _report(self) -> None:
        if self._on_progress is None:
            return
        last = self.curve[-1] if self.curve else None
        own = None if last is None else last.device_accuracy if last.test_accuracy is None else last.test_accuracy
        self._on_progress(
            Progress(
                phase=self.coordinator.head.phase,
                round=len(self._log),
                rounds=self.coordinator.run.training.rounds,
                ready=self.coordinator.roster.count_ready(),
                sample_forwards=self._labour.sample_forwards,
                mean_loss=self.rounds[-1].mean_loss if self.rounds else None,
                accuracy=own,
                virtual_s=self._clock.now,
                curve=self.curve,
                training=self.rounds,
            )
        )

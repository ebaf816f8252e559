"""The shells around both state machines: disks, clocks and crashes, no threads and no files."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable

import numpy as np

from fedzo.protocol.artifact.graph_files import GraphFile
from fedzo.protocol.device_side import device_events
from fedzo.protocol.device_side.device import Device
from fedzo.protocol.device_side.device_events import Outcome, Task
from fedzo.protocol.device_side.run_files import needed_graphs
from fedzo.protocol.pruning.layer_densities import uniform_densities
from fedzo.protocol.pruning.mask import Mask
from fedzo.protocol.server_side import coordinator_events as server_events
from fedzo.protocol.server_side.coordinator import Coordinator
from fedzo.protocol.server_side.coordinator_events import RecordKind
from fedzo.protocol.wire.codec import BinaryMessage, decode
from fedzo.protocol.wire.documents import Document, Hello, Presence, RunDocument, ServerPresence
from fedzo.protocol.wire.messages import Decline, Report, UpdateRecord
from fedzo.protocol.wire.topics import Channel, topic
from fedzo.protocol.wire.transfers import BlobBlock, LogRequest, LogSlice
from tests.protocol.simulation.fakes import FakeEngine, cut_graphs, fake_graphs, manifest_for
from tests.protocol.simulation.network import FEDERATION, LATENCY_S, SERVER, Node, Simulation

SLICE_RECORDS = 3  # few, so that catching up takes several requests
Entry = tuple[RecordKind, int, str, bytes]


class DeviceNode(Node):
    """The shell of one device.

    Attributes:
        machine: Its state machine; None before the first start.
        error: Why it left, if it did.
        computed: ``(session, round)`` of every task it worked on to the end.
        stages: Every stage it was seen in.
        alter: Changes what the engine measured, for devices that misbehave.
        wanted: Files that it can do without.
        given_back: Rounds whose scalars it was told not to count.
        fits: The largest micro-batch that does not need more memory than it has, whatever its plans say.
        opens: Whether too large a micro-batch shows only when it computes.
    """

    def __init__(self, world: Simulation, name: str, *, compute_s: float = 0.2) -> None:
        super().__init__(world, name)
        self.engine = FakeEngine(name)
        self.compute_s = compute_s
        self.session = 0
        self.blobs: dict[bytes, bytes] = {}
        self.outbox: tuple[str, Report] | None = None
        self.machine: Device | None = None
        self.error: Exception | None = None
        self.computed: list[tuple[int, int]] = []
        self.stages: set[str] = set()
        self.alter: Callable[[Task, Outcome], Outcome] = lambda _, outcome: outcome
        self.wanted: tuple[GraphFile, ...] = ()
        self.given_back: list[int] = []
        self.fits, self.opens = 8, True
        self.may_start_over = False
        self.micro_batch = 0
        self._prepared: tuple[RunDocument, Mask] | None = None
        self._task: Task | None = None

    @property
    def wakeup(self) -> float | None:
        assert self.machine is not None
        return self.machine.wakeup

    @property
    def left(self) -> bool:
        """Whether it is done or has refused."""
        return self.machine is not None and self.machine.finished

    def start(self) -> None:
        self.session += 1
        self.alive, self._prepared, self._task = True, None, None
        hello = Hello(self.session, "tests", 64.0, 12, 12, "none", "none")
        self.machine = Device(hello, outbox=self.outbox, retry_s=1.0)
        self.later(LATENCY_S, lambda: self.world.broker.connect(self))

    def will(self) -> tuple[str, bytes]:
        return topic(FEDERATION, Channel.STATE, self.name), Presence(self.session, "lost").encode()

    def on_link(self, up: bool) -> None:
        self.handle(device_events.Connected() if up else device_events.Disconnected())

    def tick(self) -> None:
        self.handle(device_events.Tick())

    def receive(self, channel: Channel, device: str, message: Document | BinaryMessage) -> None:
        self.handle(device_events.Received(channel, message))

    def handle(self, event: device_events.DeviceEvent) -> None:
        """One event and its commands."""
        if not self.alive or self.machine is None:
            return
        before = (self.machine.replica, self.machine.replica.index) if self.machine.replica else None
        for command in self.machine.on(event, self.clock):
            if self.world.crashes():
                self.world.crash(self)
                return
            self._do(command)
        if before is not None and self.machine.replica is before[0]:
            assert before[0].index >= before[1] or self.may_start_over, f"{self.name} started over without need"
        self.stages.add(self.machine.stage)
        if self.machine.stage in ("greeting", "following", "reporting") and self.online and not self.left:
            assert self.machine.wakeup is not None, f"{self.name} would wait for ever, {self.machine.stage}"
        self.sleep()

    def _do(self, command: device_events.DeviceCommand) -> None:
        if isinstance(command, device_events.Send):
            self.world.broker.publish(self, command.channel, command.message, self.name)
        elif isinstance(command, device_events.FindBlob):
            data = self.blobs.get(command.sha256)
            found = device_events.BlobFound(command.sha256, data is not None, data if data and command.read else b"")
            self.later(0.0, lambda: self.handle(found))
        elif isinstance(command, device_events.StoreBlob):
            assert hashlib.sha256(command.data).digest() == command.sha256
            self.blobs[command.sha256] = command.data
            stored = device_events.BlobFound(command.sha256, True, command.data if command.read else b"")
            self.later(0.0, lambda: self.handle(stored))
        elif isinstance(command, device_events.Plan):
            self.later(0.05, functools.partial(self._plan, command))
        elif isinstance(command, device_events.Prepare):
            assert all(graph.sha256 in self.blobs for graph in needed_graphs(command.manifest, command.run.settings))
            self.later(0.1, functools.partial(self._prepare, command))
        elif isinstance(command, device_events.Compute):
            assert self._task is None, "two tasks at once"
            assert self._prepared is not None
            assert self._prepared[1].n_survivors == command.task.weights.size
            self._task = command.task
            seconds = self.compute_s * self.world.random.uniform(0.5, 1.5)
            self.later(seconds, functools.partial(self._answer, command.task))
        elif isinstance(command, device_events.Cancel):
            if self._task is not None:
                number, self._task = self._task.number, None
                self.later(0.0, lambda: self.handle(device_events.Computed(number, None)))
        elif isinstance(command, device_events.SaveReport):
            report = decode(command.report.encode())
            assert isinstance(report, Report)
            self.outbox = (command.run, report)
        elif isinstance(command, device_events.DropReport):
            self.outbox = None
        elif isinstance(command, device_events.GiveBack):
            self.given_back.append(command.round)
        else:
            self.error = command.error
            self.later(1.0, lambda: self.world.broker.disconnect(self, will=False))

    def _plan(self, command: device_events.Plan) -> None:
        self._prepared, self.micro_batch = None, min(8, command.micro_batch or 8)
        self.handle(device_events.Planned(command.run.run, 12.5, self.micro_batch, self.wanted))

    def _prepare(self, command: device_events.Prepare) -> None:
        if self.micro_batch > self.fits and not self.opens:
            self.handle(device_events.OverBudget(command.run.run, "no memory"))
            return
        self._prepared = (command.run, command.mask)
        self.handle(device_events.Prepared(command.run.run, command.mask_sha256))

    def _answer(self, task: Task) -> None:
        if self._task is task and self._prepared is not None:
            run, mask = self._prepared
            self._task = None
            self.computed.append((self.session, task.round))
            outcome = self.alter(task, self.engine.answer(run, mask, task))
            if self.micro_batch > self.fits:
                outcome = Outcome((), 0, decline=Decline.OVER_BUDGET, detail="no memory")
            self.handle(device_events.Computed(task.number, outcome))


class ServerNode(Node):
    """The shell of the coordinator.

    Attributes:
        journal: What is on its disk.
        machine: Its state machine; None before the first start.
        error: Why the run stopped, if it did.
        trace: Every command in the order in which it was carried out, in all lives.
        lives: How often it was started.
        crash_before: Number of the command before which it dies.
        extra: Blobs that it offers besides the artifact.
        differences: By device, how far its scores are from those that the server computes.
        is_mute: It does not answer requests for blobs that it does not have.
    """

    def __init__(self, world: Simulation, run: RunDocument, *, has_test_set: bool) -> None:
        super().__init__(world, SERVER)
        self.run = run
        self.journal: list[Entry] = []
        self.machine: Coordinator | None = None
        self.error: Exception | None = None
        self.trace: list[server_events.CoordinatorCommand] = []
        self.lives = 0
        self.crash_before: int | None = None
        self.extra: tuple[bytes, ...] = ()
        self.differences: dict[str, float] = {}
        self.is_mute = False
        self._has_test_set = has_test_set
        self._blobs: dict[bytes, bytes] = {}

    @property
    def coordinator(self) -> Coordinator:
        """The state machine of the present life, or the last one."""
        assert self.machine is not None
        return self.machine

    @property
    def wakeup(self) -> float | None:
        return self.coordinator.wakeup

    @property
    def left(self) -> bool:
        """Whether the run is done or stopped."""
        return self.coordinator.finished

    def start(self) -> None:
        self.alive, self.lives = True, self.lives + 1
        manifest = manifest_for(self.run.training.estimator)
        files = [manifest.encode(), *fake_graphs().values(), *cut_graphs().values(), *self.extra]
        self._blobs = {hashlib.sha256(data).digest(): data for data in files}
        self.machine = Coordinator(self.run, manifest, birth=self.lives, has_test_set=self._has_test_set)
        for command in self.machine.restore(self.journal):
            self._do(command)
        self.later(LATENCY_S, lambda: self.world.broker.connect(self))

    def will(self) -> tuple[str, bytes]:
        return topic(FEDERATION, Channel.SERVER), ServerPresence(False, self.lives).encode()

    def on_link(self, up: bool) -> None:
        if up:
            self.handle(server_events.Connected())

    def tick(self) -> None:
        self.handle(server_events.Tick())

    def receive(self, channel: Channel, device: str, message: Document | BinaryMessage) -> None:
        self.handle(server_events.DeviceSaid(device, channel, message))

    def handle(self, event: server_events.CoordinatorEvent) -> None:
        """One event and its commands."""
        if not self.alive:
            return
        for command in self.coordinator.on(event, self.clock):
            if self.world.crashes() or len(self.trace) == self.crash_before:
                self.crash_before = None
                self.world.crash(self)
                return
            self.trace.append(command)
            self._do(command)
        self.sleep()

    def _do(self, command: server_events.CoordinatorCommand) -> None:
        if isinstance(command, server_events.Record):
            self.journal.append((command.kind, command.round, command.device, command.payload))
        elif isinstance(command, server_events.Send):
            self.world.broker.publish(self, command.channel, command.message, command.device)
        elif isinstance(command, server_events.OfferBlob):
            assert hashlib.sha256(command.data).digest() == command.sha256
            self._blobs[command.sha256] = command.data
        elif isinstance(command, server_events.WithdrawBlob):
            del self._blobs[command.sha256]
        elif isinstance(command, server_events.ServeBlob):
            self._serve_blob(command)
        elif isinstance(command, server_events.ServeLog):
            self._serve_log(command.device, command.request)
        elif isinstance(command, server_events.Evaluate):
            loss = FakeEngine(SERVER).loss(command.mask, command.weights.astype(np.float64))
            self.later(0.3, lambda: self.handle(server_events.ServerEvaluated(command.round, loss, 0.5, 10)))
        elif isinstance(command, server_events.CheckScores):
            difference = self.differences.get(command.device, 0.0)
            found = server_events.ScoresChecked(command.round, command.device, difference)
            self.later(0.2, lambda: self.handle(found))
        elif isinstance(command, server_events.MakeMask):
            layout = self.coordinator.manifest.layout
            encoded = uniform_densities(layout, self.run.settings.sparsity, 3).encode()
            self.later(0.2, lambda: self.handle(server_events.MaskMade(encoded)))
        else:
            self.error = command.error
            self.later(1.0, lambda: self.world.broker.disconnect(self))

    def _serve_blob(self, command: server_events.ServeBlob) -> None:
        request, data = command.request, self._blobs.get(command.request.sha256)
        if data is not None and request.offset < len(data):
            part = data[request.offset : request.offset + request.length]
            block = BlobBlock(request.sha256, request.offset, len(data), part)
            self.world.broker.publish(self, Channel.BLOCK, block, command.device)
        elif data is None and not self.is_mute:
            self.world.broker.publish(self, Channel.BLOCK, BlobBlock(request.sha256, 0, 0, b""), command.device)

    def _serve_log(self, device: str, request: LogRequest) -> None:
        payloads = [payload for kind, _, _, payload in self.journal if kind == "update"]
        records = []
        for payload in payloads[request.first : request.first + min(request.count, SLICE_RECORDS)]:
            record = decode(payload)
            assert isinstance(record, UpdateRecord)
            records.append(record)
        self.world.broker.publish(self, Channel.BLOCK, LogSlice(request.first, tuple(records)), device)

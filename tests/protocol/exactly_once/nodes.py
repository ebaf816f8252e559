"""The shells around both state machines, as server and agent have them, with nothing in them that takes time.

A process can die before any of its commands is carried out. What is on the disk stays: the server's journal, which
takes the records of a batch in one transaction before anything else of the batch is done, and a device's session,
blobs and outbox. What must hold at every step is checked here, what must hold in the end in ``invariants``.
"""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Callable

import numpy as np

from fedzo.broker_server.history.recovery import entries_to_resume, keep_last_snapshot
from fedzo.broker_server.journal import Entry, MemoryJournal
from fedzo.protocol.device_side import device_events
from fedzo.protocol.device_side.device import Device
from fedzo.protocol.device_side.device_events import Outcome, Task
from fedzo.protocol.device_side.run_files import needed_graphs
from fedzo.protocol.pruning.layer_densities import uniform_densities
from fedzo.protocol.server_side import coordinator_events as server_events
from fedzo.protocol.server_side.coordinator import Coordinator
from fedzo.protocol.server_side.snapshots import SnapshotClock
from fedzo.protocol.wire.documents import Announcement, Hello, Order, Presence, RunDocument, ServerPresence
from fedzo.protocol.wire.messages import KINDS, Decline, Receipt, Report, ReportKind, UpdateRecord, Verdict
from fedzo.protocol.wire.topics import Channel
from fedzo.protocol.wire.transfers import BlobBlock, LogSlice
from tests.protocol.exactly_once.artifact import SharedParts, artifact_of
from tests.protocol.exactly_once.ledger import PlainEntry, read_announcement, read_update
from tests.protocol.exactly_once.network import SERVER, Client, Flight, Network
from tests.protocol.exactly_once.plans import Board, Plan

__all__ = ["DeviceNode", "Process", "ServerNode"]

SLICE_RECORDS = 2  # few, so that catching up takes several requests
MICRO_BATCH = 8


class Process(Client):
    """A client with a clock, which can die.

    Attributes:
        clock: Its monotonic clock; begins anywhere with every start.
        crash_before: Number of the command before which it dies, counted from now on; None to live.
    """

    def __init__(self, network: Network, name: str) -> None:
        super().__init__(network, name)
        self.clock = 0.0
        self.crash_before: int | None = None

    @property
    def wakeup(self) -> float | None:
        """When its machine wants to be woken up."""
        raise NotImplementedError

    @property
    def left(self) -> bool:
        """Whether the process has ended by itself."""
        raise NotImplementedError

    def start(self) -> None:
        """Start the process anew."""
        raise NotImplementedError

    def tick(self) -> None:
        """Give the machine a Tick."""
        raise NotImplementedError

    def crash(self) -> None:
        """Lose everything but the disk."""
        self.alive, self.crash_before = False, None
        self.local.clear()
        self.held = [flight for flight in self.held if not flight.up]
        self.network.disconnect(self)

    def dies(self) -> bool:
        """Whether the process dies before its next command."""
        if self.crash_before is None:
            return False
        self.crash_before -= 1
        if self.crash_before < 0:
            self.crash()
            return True
        return False


class DeviceNode(Process):
    """The shell of one device.

    Attributes:
        board: Its flaws.
        session: Boot counter, on its disk.
        outbox: On its disk.
        error: Why it left, if it did.
        sent: The one report of every ``(session, round)``.
        accepted: Rounds whose report it was told to be accepted, or to be there already.
    """

    def __init__(self, network: Network, name: str, board: Board, plan: Plan, server: ServerNode) -> None:
        super().__init__(network, name)
        self.board = board
        self.session = 0
        self.outbox: tuple[str, Report] | None = None
        self.error: Exception | None = None
        self.sent: dict[tuple[int, int], Report] = {}
        self.accepted: set[int] = set()
        self._server, self._plan = server, plan
        self._blobs = dict(artifact_of(plan.settings.training.estimator)[1]) if board.has_graphs else {}
        self._work: deque[Callable[[], device_events.DeviceEvent]] = deque()
        self._cancelled = self._submitted = 0
        self._micro_batch = 0
        self.machine = Device(self._hello(), retry_s=1.0, parts=SharedParts())

    def _hello(self) -> Hello:
        return Hello(self.session, "tests", 64.0, 12, 12, "none", "none")

    @property
    def wakeup(self) -> float | None:
        return self.machine.wakeup

    @property
    def left(self) -> bool:
        return self.machine.finished

    def start(self) -> None:
        self.session += 1
        self.alive = True
        self._work.clear()
        self._cancelled = self._submitted = 0
        self.machine = Device(self._hello(), outbox=self.outbox, retry_s=1.0, parts=SharedParts())

    def will(self) -> Flight:
        return Flight(None, True, Channel.STATE, self.name, Presence(self.session, "lost"))

    def on_link(self, up: bool) -> None:
        self.handle(device_events.Connected() if up else device_events.Disconnected())

    def tick(self) -> None:
        self.handle(device_events.Tick())

    def receive(self, flight: Flight) -> None:
        message = flight.message
        if isinstance(message, Receipt) and message.verdict in (Verdict.ACCEPTED, Verdict.DUPLICATE):
            self.accepted.add(message.round)
        self.handle(device_events.Received(flight.channel, message))

    def handle(self, event: device_events.DeviceEvent) -> None:
        """One event and its commands."""
        if not self.alive or self.machine.finished:
            return
        for command in self.machine.on(event, self.clock):
            if self.dies():
                return
            self._do(command)

    def _later(self, event: device_events.DeviceEvent) -> None:
        self.local.append(lambda: self.handle(event))

    def _do(self, command: device_events.DeviceCommand) -> None:
        if isinstance(command, device_events.Send):
            if isinstance(command.message, Report):
                self._check_report(command.message)
            self.network.publish(self, command.channel, command.message, self.name)
        elif isinstance(command, device_events.FindBlob):
            data = self._blobs.get(command.sha256)
            self._later(
                device_events.BlobFound(command.sha256, data is not None, data if data and command.read else b"")
            )
        elif isinstance(command, device_events.StoreBlob):
            assert hashlib.sha256(command.data).digest() == command.sha256
            self._blobs[command.sha256] = command.data
            self._later(device_events.BlobFound(command.sha256, True, command.data if command.read else b""))
        elif isinstance(command, device_events.Plan):
            self._submit(functools.partial(self._planned, command))
        elif isinstance(command, device_events.Prepare):
            graphs = needed_graphs(command.manifest, command.run.settings)
            assert all(graph.sha256 in self._blobs for graph in graphs), "prepared without a graph"
            self._submit(functools.partial(self._prepared, command))
        elif isinstance(command, device_events.Compute):
            self._check_task(command.task)
            self._submitted = command.task.number
            self._submit(functools.partial(self._computed, command.task))
        elif isinstance(command, device_events.Cancel):
            self._cancelled = self._submitted
        elif isinstance(command, device_events.SaveReport):
            self.outbox = (command.run, command.report)
        elif isinstance(command, device_events.DropReport):
            self._check_drop()
            self.outbox = None
        elif isinstance(command, device_events.GiveBack):
            pass  # these engines keep no residual
        else:
            self.error = command.error
            self.network.flights += self.held  # It says goodbye: its queue is sent, and there is no will.
            self.held.clear()

    # --- the worker -----------------------------------------------------------------------------------------------

    def _submit(self, work: Callable[[], device_events.DeviceEvent]) -> None:
        """The worker takes one command after another; its answers are events like any other."""
        self._work.append(work)
        self.local.append(lambda: self._later(self._work.popleft()()))

    def _planned(self, command: device_events.Plan) -> device_events.DeviceEvent:
        self._micro_batch = min(MICRO_BATCH, command.micro_batch or MICRO_BATCH)
        return device_events.Planned(command.run.run, 12.5, self._micro_batch)

    def _prepared(self, command: device_events.Prepare) -> device_events.DeviceEvent:
        if self._micro_batch > self.board.fits and not self.board.opens:
            return device_events.OverBudget(command.run.run, "no memory")
        return device_events.Prepared(command.run.run, command.mask_sha256)

    def _computed(self, task: Task) -> device_events.DeviceEvent:
        if task.number <= self._cancelled:
            return device_events.Computed(task.number, None)
        if self._micro_batch > self.board.fits:
            outcome = Outcome((), 0, decline=Decline.OVER_BUDGET, detail="no memory")
        elif self.board.answers == "declines":
            outcome = Outcome((), 0, decline=Decline.NO_DATA, detail="no data")
        else:
            outcome = self._measured(task)
        return device_events.Computed(task.number, outcome)

    def _measured(self, task: Task) -> Outcome:
        """Scalars that depend on device, round and session, so that no two reports are alike."""
        key = f"{self.name} {task.round} {self.session}".encode()
        if task.kind is ReportKind.EVALUATE:
            return Outcome((np.array([6.0, 7.0, 12.0], dtype=np.float32),), 12, 0.5, 4, 4 * self.board.query_ms)
        if task.kind is ReportKind.PROBE:
            sizes = [positions.size for positions in task.positions]
        else:
            manifest = artifact_of(self._plan.settings.training.estimator)[0]
            draws = self._plan.settings.saliency.draws
            sizes = [manifest.n_units, manifest.n_moments, *([len(manifest.units)] if draws else [])]
        if self.board.answers == "hostile":
            sizes[0] += 1
        blocks = []
        for number, size in enumerate(sizes):
            data = b"".join(hashlib.blake2b(key + bytes([number, part])).digest() for part in range((size + 63) // 64))
            values = np.frombuffer(data, dtype=np.int8)[:size].astype(np.float32) / np.float32(64.0)
            blocks.append(values if task.kind is ReportKind.PROBE else np.abs(values) + np.float32(0.125))
        return Outcome(tuple(blocks), 12, 1.0, 4, 4 * self.board.query_ms)

    # --- what must hold -------------------------------------------------------------------------------------------

    def _check_task(self, task: Task) -> None:
        head = self._server.announced[task.round]
        assert KINDS[head.phase] is task.kind
        if head.phase == "train":
            assert task.weights_digest.hex() == head.weights_digest, f"{self.name} computes with other weights"

    def _check_report(self, report: Report) -> None:
        """It is on the disk before it is sent, and a session never says two things about a round."""
        assert self.outbox is not None
        assert self.outbox[1] is report, f"{self.name} sends what it did not save"
        first = self.sent.setdefault((report.session, report.round), report)
        assert first is report, f"{self.name} has two reports on round {report.round} in one session"

    def _check_drop(self) -> None:
        """A report is forgotten once its fate is in the journal."""
        assert self.outbox is not None
        run, report = self.outbox
        if run == self._server.run.run:
            key = (report.round, self.name)
            server = self._server
            decided = key in server.reports or key in server.refusals or report.round != server.open_round
            assert decided, f"{self.name} drops its report on the open round {report.round}, which nobody took"


class ServerNode(Process):
    """The shell of the coordinator.

    Attributes:
        journal: What is on its disk.
        run: The run's document.
        announced: Announcements by round, from the journal.
        open_round: The round that the journal has no decision on; -1 for none.
        reports: Of the journal, by round and device.
        refusals: Of the journal, by round and device.
        updates: Of the journal.
        enrolled: Devices of the journal.
        finalists: Those that were there when the end was announced, or took part until then.
        lives: How often it was started.
        stops: How often the run stopped for want of a quorum.
        error: Why it stopped last.
        counts: What happened, for statistics.
    """

    def __init__(self, network: Network, plan: Plan) -> None:
        super().__init__(network, SERVER)
        self._plan = plan
        self._manifest, self._files = artifact_of(plan.settings.training.estimator)
        data = self._manifest.encode()
        self.run = RunDocument("run-1", hashlib.sha256(data).hexdigest(), len(data), plan.settings)
        self.keeps_session, self.queues = plan.weather.server_session, plan.weather.server_queues
        self.journal = MemoryJournal()
        self.announced: dict[int, Announcement] = {}
        self.open_round = -1
        self.reports: dict[tuple[int, str], bytes] = {}
        self.refusals: set[tuple[int, str]] = set()
        self.enrolled: set[str] = set()
        self.finalists: set[str] = set()
        self.updates: list[UpdateRecord] = []
        self.lives = self.stops = 0
        self.birth = 1_000
        self.error: Exception | None = None
        self.counts = {"duplicate": 0, "late": 0, "refused": 0, "accepted": 0}
        self._inbox: list[tuple[server_events.CoordinatorEvent, Flight | None]] = []
        self._asked: set[object] = set()
        self.machine = self._coordinator()

    def _coordinator(self) -> Coordinator:
        machine = Coordinator(self.run, self._manifest, birth=self.birth, has_test_set=self._plan.has_test_set)
        if self._plan.snapshot_every:
            machine._clock = _OftenDue(self._plan.snapshot_every)
        return machine

    def entries_to_resume(self) -> list[PlainEntry]:
        """What a server that starts reads: the newest snapshot and what came after, if there is one."""
        snapshots = self.journal.sequences("snapshot")
        return list(entries_to_resume(self.journal, snapshots[-1])) if snapshots else self.entries()

    def entries(self) -> list[PlainEntry]:
        """The journal, as the machine reads it."""
        return [(entry.kind, entry.round, entry.device, entry.payload) for _, entry in self.journal.read()]

    @property
    def wakeup(self) -> float | None:
        return self.machine.wakeup

    @property
    def left(self) -> bool:
        return self.machine.finished

    def start(self) -> None:
        self.alive, self.lives, self.error = True, self.lives + 1, None
        self.birth += self.network.random.choice([1, 1, 50, -50])  # a wall clock may be set back
        self._inbox.clear()
        self._asked.clear()
        self._blobs = dict(self._files)
        self.machine = self._coordinator()
        for command in self.machine.restore(self.entries_to_resume()):
            self._do(command)

    def will(self) -> Flight:
        return Flight(None, True, Channel.SERVER, "", ServerPresence(False, self.birth))

    def on_link(self, up: bool) -> None:
        if up:
            self.handle([(server_events.Connected(), None)])

    def tick(self) -> None:
        self.handle([(server_events.Tick(), None)])

    def receive(self, flight: Flight) -> None:
        self._inbox.append((server_events.DeviceSaid(flight.device, flight.channel, flight.message), flight))
        if len(self._inbox) >= self._plan.weather.batch:
            self.commit()
        elif len(self._inbox) == 1:
            self.local.append(self.commit)

    def commit(self) -> None:
        """Take what has come in one transaction."""
        batch, self._inbox = self._inbox, []
        if batch:
            self.handle(batch)

    def handle(self, batch: list[tuple[server_events.CoordinatorEvent, Flight | None]]) -> None:
        """Some events: everything recorded is one transaction, then come the other commands, then acknowledgements."""
        if not self.alive or self.machine.finished:
            return
        commands: list[server_events.CoordinatorCommand] = []
        for event, _ in batch:
            commands += self.machine.on(event, self.clock)
        if self.dies():
            return
        self._append([command for command in commands if isinstance(command, server_events.Record)])
        for command in commands:
            if not isinstance(command, server_events.Record):
                if self.dies():
                    return
                self._do(command)
        if not self.dies():
            waiting = self.network.unacknowledged
            for _, flight in batch:
                if flight is not None and flight in waiting:
                    waiting.remove(flight)

    def _append(self, records: list[server_events.Record]) -> None:
        """One transaction; the journal refuses a second report of a round and device, whatever the machine thinks."""
        if not records:
            return
        self.journal.append([Entry(r.kind, r.round, r.device, r.payload, 0.0) for r in records])
        keep_last_snapshot(self.journal, {record.kind for record in records})
        for record in records:
            kind, round_, device, payload = record.kind, record.round, record.device, record.payload
            if kind == "announce":
                self.announced[round_] = read_announcement(payload)
                self.open_round = round_ if self.announced[round_].phase in KINDS else -1
                if self.announced[round_].phase == "done":
                    self._note_finalists(self.announced[max(self.announced.keys() - {round_})])
            elif kind == "report":
                self.reports[round_, device] = payload
            elif kind == "refusal":
                self.refusals.add((round_, device))
            elif kind == "enrolment":
                self.enrolled.add(device)
            elif kind in ("mask", "update", "evaluation"):
                self.open_round = -1
                if kind == "update":
                    self.updates.append(read_update(payload))

    def _note_finalists(self, last: Announcement) -> None:
        roster = self.machine.roster
        members = {name: roster.members[name] for name in self.enrolled}  # Others came after it.
        here = {name for name, member in members.items() if member.status in ("joining", "ready")}
        self.finalists = here | set(roster.names_of(last.participants))

    def _do(self, command: server_events.CoordinatorCommand) -> None:
        if isinstance(command, server_events.Send):
            self._check_send(command)
            self.network.publish(self, command.channel, command.message, command.device)
        elif isinstance(command, server_events.OfferBlob):
            self._blobs[command.sha256] = command.data
        elif isinstance(command, server_events.WithdrawBlob):
            self._blobs.pop(command.sha256, None)
        elif isinstance(command, server_events.ServeBlob):
            request, data = command.request, self._blobs.get(command.request.sha256)
            part = b"" if data is None else data[request.offset : request.offset + request.length]
            if data is None or part:
                block = BlobBlock(request.sha256, request.offset if part else 0, len(data or b""), part)
                self.network.publish(self, Channel.BLOCK, block, command.device)
        elif isinstance(command, server_events.ServeLog):
            first, count = command.request.first, min(command.request.count, SLICE_RECORDS)
            records = tuple(self.updates[first : first + count])
            self.network.publish(self, Channel.BLOCK, LogSlice(first, records), command.device)
        elif isinstance(command, server_events.Finish):
            self.error = command.error
            self.stops += command.error is not None
        elif not isinstance(command, server_events.Record):
            self._pass(command)

    def _pass(self, command: server_events.Evaluate | server_events.MakeMask | server_events.CheckScores) -> None:
        """The server's own passes; the same question is not worked on twice."""
        if isinstance(command, server_events.CheckScores):
            wrong = self._plan.boards[int(command.device.rpartition("-")[2])].answers == "wrong"
            answer: server_events.CoordinatorEvent = server_events.ScoresChecked(
                command.round, command.device, 1.0 if wrong else 0.0
            )
        elif isinstance(command, server_events.Evaluate):
            answer = server_events.ServerEvaluated(command.round, 0.5, 0.75, 10)
        else:
            layout = self.machine.manifest.layout
            answer = server_events.MaskMade(uniform_densities(layout, self.run.settings.sparsity, 3).encode())
        if not isinstance(command, server_events.CheckScores):
            asked = (type(command), getattr(command, "round", 0))
            if asked in self._asked:
                return
            self._asked.add(asked)
        self.local.append(lambda: self.handle([(answer, None)]))

    # --- what must hold -------------------------------------------------------------------------------------------

    def _check_send(self, command: server_events.Send) -> None:
        """Nothing is said before what it depends on is recorded."""
        message, device = command.message, command.device
        if isinstance(message, Receipt):
            self.counts[message.verdict.name.lower()] += 1
            if message.verdict in (Verdict.ACCEPTED, Verdict.DUPLICATE):
                assert (message.round, device) in self.reports, f"a receipt for what is not recorded: {message}"
            elif message.verdict is Verdict.REFUSED:
                assert (message.round, device) in self.refusals
        elif isinstance(message, UpdateRecord):
            assert message.encode() == self.updates[message.index].encode()
        elif isinstance(message, Announcement):
            assert message.round == 0 or self.announced.get(message.round) == message
        elif isinstance(message, Order) and message.action != "refuse":
            assert device in self.enrolled
            assert message.action == "enrol" or self.announced


class _OftenDue(SnapshotClock):
    """Snapshots after a few updates, however small the journal is."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self._every = every

    def is_due(self, size: int, n_survivors: int) -> bool:
        """See :class:`SnapshotClock`."""
        return super().is_due(size, n_survivors) or self._updates >= self._every

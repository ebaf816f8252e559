"""The coordinator's shell: MQTT, journal, clock and test set around ``protocol.server_side.coordinator``.

One thread takes events from a queue. What arrives within a few milliseconds is one batch: the machine sees every event
of it, all that it records is committed in one transaction, and only then is anything sent or acknowledged to the
broker. So an acknowledged report is on the disk, and a crash in between only makes a device send again.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..edge_runtime.connection.inbox import Inbox
from ..edge_runtime.connection.transport import (
    Arrived,
    MqttTransport,
    Publication,
    Token,
    TransportEvent,
    Will,
)
from ..edge_runtime.datasets.data import Samples
from ..protocol.errors import BrokerError, FedzoError
from ..protocol.server_side import coordinator_events as machine
from ..protocol.server_side.coordinator import Coordinator
from ..protocol.wire.documents import Order, Presence, RunDocument, ServerPresence
from ..protocol.wire.topics import RETAINED, Channel, server_subscriptions, topic
from .blobs import BlobServer
from .brokers.base import Broker
from .group_commit import gather
from .history.recovery import keep_last_snapshot, resume
from .history.run_folder import RunFolder
from .history.summary import held_out_accuracy
from .intake import Drops, Intake
from .journal import Entry, Journal
from .log_slices import log_slice
from .rivals import Rivals
from .security.access import REVOKED, Access
from .server_passes import ServerPasses
from .server_state import server_state
from .telemetry.observer import ServerState, Telemetry, Turn

__all__ = ["Progress", "Server"]

_log = logging.getLogger(__name__)

BROKER_CHECK_S = 2.0
MAX_INFLIGHT = 400  # a managed Mosquitto takes 500
PROGRESS_S = 0.1  # between two reports to the observer that have nothing new but their counts
LEAVE_S = 3.0  # for what has arrived, once the server is to stop
INBOX_MESSAGES, INBOX_BYTES = 20_000, 64 << 20  # beyond, the broker waits
OUTGOING_MESSAGES, OUTGOING_BYTES = 200_000, 64 << 20
BLOCKS_BYTES = 32 << 20  # beyond, devices have to ask again for blobs and records


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands; given to the observer after batches that recorded something.

    Attributes:
        phase: Of the announced round.
        round: Its number.
        updates: Updates made.
        updates_total: Updates to make.
        devices: Enrolled devices.
        ready: Devices that a round can count on.
        accuracy: Latest held-out accuracy: the server's test set if it has one, else the devices'.
    """

    phase: str
    round: int
    updates: int
    updates_total: int
    devices: int
    ready: int
    accuracy: float | None


class Server:
    """Serves one run until it is done or stopped.

    Args:
        folder: The run's folder.
        run: The run's document.
        broker: Started by the caller.
        journal: Open for writing.
        federation: Topic level of the federation.
        test_set: The server's own test samples.
        observer: Called on the server's thread; what it raises ends the run.
        threads: Threads of the server's own passes.
        telemetry: Sees every turn; what it raises ends the run, see :class:`~.telemetry.observer.Watchers`.
        access: Whose messages count, and the key that signs; without it everybody's, and nothing is signed.

    Attributes:
        coordinator: The run as it stands.
        resumed_at: Updates that the journal held at the start.

    Raises:
        ProtocolError: The journal belongs to another run.
    """

    def __init__(
        self,
        folder: RunFolder,
        run: RunDocument,
        broker: Broker,
        journal: Journal,
        *,
        federation: str = "default",
        test_set: Samples | None = None,
        observer: Callable[[Progress], None] | None = None,
        threads: int = 1,
        telemetry: Telemetry | None = None,
        access: Access | None = None,
    ) -> None:
        self._folder, self._broker, self._journal, self._federation = folder, broker, journal, federation
        self._observer, self._telemetry = observer, telemetry
        self._shown: tuple[object, ...] = ()
        self._shown_at = 0.0
        self._events: Inbox[TransportEvent | machine.CoordinatorEvent | FedzoError] = Inbox(INBOX_MESSAGES, INBOX_BYTES)
        self._drops = Drops()
        self._access = access
        self._intake = Intake(federation, self._drops, access)
        self._asked = self._answered = 0
        self._turned_at = time.monotonic()
        self._stop = threading.Event()
        self._blobs = BlobServer(folder.artifact, folder.artifact_path)
        self._passes = ServerPasses(folder.artifact, run, test_set, threads=threads, cancelled=self._stop.is_set)
        self._computing: set[tuple[type, int]] = set()
        self._limits: dict[str, int] = {}
        self._refused: set[str] = set()
        birth = time.time_ns() // 1_000_000
        manifest, can_test = folder.artifact.manifest, test_set is not None
        self.coordinator, offers = resume(
            lambda: Coordinator(run, manifest, birth=birth, has_test_set=can_test), journal
        )
        for offer in offers:
            if isinstance(offer, machine.OfferBlob):
                self._blobs.offer(offer.sha256, offer.data)
        self._log_sequences = journal.sequences("update")
        self.resumed_at = self.coordinator.replica.index
        away = ServerPresence(False, birth)
        self._goodbye = Publication(topic(federation, Channel.SERVER), away.encode(), retain=True)
        self._rivals = Rivals(federation, birth, self._events.put)
        self._transport = MqttTransport(
            broker.url,
            broker.client_id or (broker.login.username if broker.login else f"fedzo-server-{federation}"),
            username=broker.login.username if broker.login else None,
            password=broker.login.password if broker.login else None,
            tls=broker.tls,
            on_event=self._rivals.hear,
            subscriptions=(self._goodbye.topic, *server_subscriptions(federation)),  # Rivals' first, before any device.
            will=Will(self._goodbye.topic, self._goodbye.payload),
            clean_start=False,
            session_expiry_s=86_400,
            manual_ack=True,
            max_inflight=MAX_INFLIGHT,
            max_queued=OUTGOING_MESSAGES,
            max_queued_bytes=OUTGOING_BYTES,
            may_read=self._events.has_room,
        )
        self._rivals.transport = self._transport

    @property
    def traffic(self) -> dict[str, tuple[int, int]]:
        """MQTT bytes of this process by topic: ``(sent by the server, received by the server from devices)``."""
        flows, own = self._transport.traffic.by_topic().items(), self._goodbye.topic
        return {name: (up.packet_bytes, 0 if name == own else down.packet_bytes) for name, (up, down) in flows}

    @property
    def state(self) -> ServerState:
        """How the server stands; from any thread."""
        waiting = self._asked - self._answered
        return server_state(self.coordinator, self._events, self._transport, passes=waiting, dropped=self._drops.counts,
                            turned_at=self._turned_at)  # fmt: skip

    def stop(self) -> None:
        """Ask :meth:`serve` to record what has arrived and return; safe in a signal handler."""
        self._stop.set()
        self._events.put(machine.Tick())

    def dismiss(self, admitted: frozenset[str]) -> None:
        """Do not wait for devices other than these, as they have lost their rights; from any thread."""
        for name, member in list(self.coordinator.roster.members.items()):
            if name not in admitted and member.is_alive:
                gone = Presence(member.session, "left", detail=REVOKED)
                self._events.put(machine.DeviceSaid(name, Channel.STATE, gone))

    def serve(self, *, connect_timeout_s: float = 30.0) -> None:
        """Run to the end.

        Raises:
            BrokerError: The broker cannot be reached at first, the managed one died, or another server took over.
            QuorumError: Too few devices; the run can be resumed.
            FedzoError: Training diverged, or the journal cannot be written.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix="passes")
        try:
            if not self.coordinator.finished:  # Else the run was resumed after its end.
                connect = threading.Thread(target=self._connect, args=(connect_timeout_s,), daemon=True)
                connect.start()  # so that a server without a broker can be stopped too
            while not self._stop.is_set() and not self.coordinator.finished:
                self._carry_out(self._next_batch(), pool)
            self._leave(pool)
        except BrokerError as error:  # Perhaps only that nothing can be published any more.
            raise self._rivals.error or error from None
        finally:
            self._stop.set()  # also for an evaluation that runs
            pool.shutdown(cancel_futures=True)
            self._transport.close(self._goodbye)

    def _connect(self, timeout_s: float) -> None:
        try:
            self._transport.connect(timeout_s)
        except FedzoError as error:
            self._events.put(error)

    def _leave(self, pool: ThreadPoolExecutor) -> None:
        """Record and acknowledge what has arrived, without another round; a resumed server goes on from there."""
        self.coordinator.leaving = True
        until = time.monotonic() + LEAVE_S
        while not self._events.empty() and time.monotonic() < until and not self.coordinator.finished:
            self._carry_out([item for item in self._next_batch() if not isinstance(item, FedzoError)], pool)

    # --- one batch ------------------------------------------------------------------------------------------------

    def _next_batch(self) -> list[TransportEvent | machine.CoordinatorEvent | FedzoError]:
        self._turned_at = time.monotonic()
        wakeup = self.coordinator.wakeup
        wait_s = BROKER_CHECK_S if wakeup is None else min(BROKER_CHECK_S, max(0.0, wakeup - time.monotonic()))
        try:
            return gather(self._events, wait_s)
        except queue.Empty:
            if (failure := self._broker.failure()) is not None:
                raise BrokerError(f"the broker is gone: {failure}", hint="see why it ended") from None
            return [machine.Tick()]

    def _carry_out(
        self, batch: Sequence[TransportEvent | machine.CoordinatorEvent | FedzoError], pool: ThreadPoolExecutor
    ) -> None:
        began = time.monotonic()
        events: list[machine.CoordinatorEvent] = []
        commands: list[machine.CoordinatorCommand] = []
        tokens: list[Token] = []
        for item in batch:
            if isinstance(item, FedzoError):
                raise item
            if isinstance(item, Arrived) and item.token is not None:
                tokens.append(item.token)
            event = self._intake.event(item)
            if event is not None:
                events.append(event)
                commands += self.coordinator.on(event, time.monotonic())
        decided = time.monotonic()
        self._record([c for c in commands if isinstance(c, machine.Record)])
        committed = time.monotonic()
        for command in commands:
            self._do(command, pool)
        for token in tokens:
            self._transport.acknowledge(token)
        if self._telemetry is not None:
            self._telemetry.turn(Turn(events, commands, began, decided, committed, time.monotonic()))
        if self._observer is not None and any(isinstance(c, machine.Record) for c in commands) and self._is_news():
            self._observer(self.progress)
        for command in commands:
            if isinstance(command, machine.Finish) and command.error is not None:
                raise command.error

    def _is_news(self) -> bool:
        """Whether the observer should look now: to count the devices that are ready takes a look at each of them."""
        coordinator, now = self.coordinator, time.monotonic()
        marks = (coordinator.head, coordinator.replica.index, len(coordinator.evaluations))
        if marks == self._shown and now < self._shown_at + PROGRESS_S:
            return False
        self._shown, self._shown_at = marks, now
        return True

    def _record(self, records: list[machine.Record]) -> None:
        if not records:
            return
        now = time.time()
        entries = [Entry(r.kind, r.round, r.device, r.payload, now) for r in records]
        sequences = self._journal.append(entries)
        for record in records:
            if record.kind == "refusal" and record.device not in self._refused:  # Once: it may go on for ever.
                self._refused.add(record.device)
                known = {"event": "refused", "round": record.round, "device": record.device}
                why = record.payload.decode()
                _log.warning("refused in round %d: %s: %s", record.round, record.device, why, extra=known)
            elif record.kind == "mask" and (unscored := self.coordinator.unscored):
                known = {"event": "unscored", "round": record.round}
                _log.warning("unit shifts do not show in %s: see docs/pruning.md", ", ".join(unscored), extra=known)
        updates = [s for s, r in zip(sequences, records, strict=True) if r.kind == "update"]
        self._log_sequences += updates
        keep_last_snapshot(self._journal, {record.kind for record in records})

    def _do(self, command: machine.CoordinatorCommand, pool: ThreadPoolExecutor) -> None:
        if isinstance(command, machine.Send):
            if isinstance(command.message, Order):
                self._note(command.device, command.message)
            self._send(command.channel, command.message.encode(), command.device)
        elif isinstance(command, machine.OfferBlob):
            self._blobs.offer(command.sha256, command.data)
        elif isinstance(command, machine.WithdrawBlob):
            self._blobs.withdraw(command.sha256)
        elif isinstance(command, machine.ServeBlob):
            block = self._blobs.block(command.request)
            if block is not None:
                self._send(Channel.BLOCK, block.encode(), command.device)
        elif isinstance(command, machine.ServeLog):
            self._send_log(command)
        elif isinstance(command, machine.CheckScores):
            self._asked += 1
            pool.submit(self._compute, command)
        elif isinstance(command, (machine.Evaluate, machine.MakeMask)):
            asked = type(command), command.round if isinstance(command, machine.Evaluate) else 0
            if asked not in self._computing:  # It is asked for again after every break of the link.
                self._computing.add(asked)
                self._asked += 1
                pool.submit(self._compute, command)

    def _note(self, device: str, order: Order) -> None:
        """Say once what a board's memory makes of its part in the run."""
        limit = 0 if order.action == "excuse" else order.micro_batch
        if (limit or order.action == "excuse") and self._limits.get(device) != limit:
            self._limits[device] = limit
            what = f"may use a micro-batch of {limit} at most" if limit else "is excused from the run"
            why = order.detail or "over its memory budget with a larger one"
            _log.warning("%s %s: %s", device, what, why, extra={"event": "lowered", "device": device})

    def _send(self, channel: Channel, payload: bytes, device: str = "") -> None:
        if channel is Channel.BLOCK and self._transport.queue.bytes + len(payload) > BLOCKS_BYTES:
            self._drops.add("blocks", "a block for %s does not fit the queue; it will ask again", device)
            return
        if self._access is not None:
            payload = self._access.signer.sign(self._federation, channel, device, payload)
        name, qos = topic(self._federation, channel, device), 0 if channel is Channel.ACK else 1
        self._transport.publish(name, payload, qos, retain=channel in RETAINED)

    def _send_log(self, command: machine.ServeLog) -> None:
        def payload(number: int) -> bytes:
            return self._journal.get(self._log_sequences[number]).payload

        part = log_slice(command.request, len(self._log_sequences), payload)
        if part is not None:
            self._send(Channel.BLOCK, part.encode(), command.device)

    def _compute(self, command: machine.Evaluate | machine.MakeMask | machine.CheckScores) -> None:
        """On the pool's thread. Scores of a round that has closed meanwhile are not worth a pass."""
        try:
            if isinstance(command, machine.CheckScores) and command.round != self.coordinator.head.round:
                return
            answer = self._passes.answer(command)
            if answer is not None:
                self._events.put(answer)
        except FedzoError as error:
            self._events.put(error)
        except Exception as error:  # noqa: BLE001 (a future's exception would otherwise be lost, and the round hang)
            self._events.put(FedzoError(f"the server's own passes failed: {type(error).__name__}: {error}"))
        finally:
            self._answered += 1

    # --- the rest -------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> Progress:
        """Where the run stands now."""
        coordinator = self.coordinator
        evaluations = coordinator.evaluations
        return Progress(
            phase=coordinator.head.phase,
            round=coordinator.head.round,
            updates=coordinator.replica.index,
            updates_total=coordinator.run.training.rounds,
            devices=len(coordinator.roster.members),
            ready=coordinator.roster.count_ready(),
            accuracy=held_out_accuracy(evaluations[-1]) if evaluations else None,
        )

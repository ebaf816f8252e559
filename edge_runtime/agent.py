"""The device's shell: MQTT, files, clock and a computing thread around the machine of ``protocol.device_side.device``.

One thread takes events from a queue, gives them to the machine and carries out its commands. It never waits for
anything but that queue: the network and the computations have threads of their own.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..protocol.device_side import device_events as machine
from ..protocol.device_side.device import RETRY_S, Device
from ..protocol.errors import ArtifactError, BrokerError, ConfigError, FedzoError, ProtocolError
from ..protocol.wire.documents import Hello, Presence, RunDocument, ServerPresence
from ..protocol.wire.framing import MAX_PAYLOAD_BYTES
from ..protocol.wire.messages import ReportKind
from ..protocol.wire.topics import RETAINED, Channel, device_subscriptions, topic
from .connection.endpoint import TlsConfig
from .connection.inbound import read_message
from .connection.inbox import Inbox
from .connection.link_news import LinkNews
from .connection.transport import Arrived, Connected, Disconnected, MqttTransport, Rejected, TransportEvent, Will
from .datasets.data import Dataset
from .inference.ort import provider_in_use
from .installation.service import ServiceManager
from .planning.memory import peak_rss_mib
from .storage.run_key import RunKey
from .storage.state import DeviceState
from .worker import Limits, Worker

__all__ = ["Agent", "Connection", "Summary"]

_log = logging.getLogger(__name__)

FLUSH_S = 10.0
INBOX_MESSAGES, INBOX_BYTES = 256, 2 << 20  # what may wait for the loop
OUTGOING_BYTES = 4 << 20
_PACKET_OVERHEAD_BYTES = 1024  # header, topic and properties around the largest payload
_WORK = {ReportKind.SALIENCY: "scoring weights", ReportKind.PROBE: "training", ReportKind.EVALUATE: "evaluating"}


@dataclass(frozen=True)
class Connection:
    """Where the broker is and how to get in.

    Attributes:
        url: ``mqtt://`` or ``mqtts://``.
        username: The device id when None and there is a password.
        password: Never shown.
        tls: Files for ``mqtts://``.
        timeout_s: Time for the first connection; None to try for ever.
    """

    url: str
    username: str | None = None
    password: str | None = dataclasses.field(default=None, repr=False)
    tls: TlsConfig | None = None
    timeout_s: float | None = None


@dataclass
class Summary:
    """What a device did since it started.

    Attributes:
        device: Its id.
        session: Its boot counter.
        run: The last run it knew; empty if none.
        status: ``done``, ``refused``, ``left``, or where it was.
        log_length: Update records applied.
        weights_digest: Digest of its weights, 32 hex digits; empty without a run.
        provider: Execution provider that graphs ran on; empty if none did.
        planned_peak_mib: What the memory plan says; 0 without one.
        layout: What losses were computed with, ``portable`` or ``blocked``; empty if none were.
        peak_rss_mib: What the process used at most.
        reports: Reports made, declined ones included.
        declined: Those without scalars.
        queries: Forward passes.
        bytes_up: MQTT bytes sent.
        bytes_down: MQTT bytes received.
        dropped: Payloads that were no message.
    """

    device: str
    session: int
    run: str = ""
    status: str = "joining"
    log_length: int = 0
    weights_digest: str = ""
    provider: str = ""
    planned_peak_mib: float = 0.0
    layout: str = ""
    peak_rss_mib: float = 0.0
    reports: int = 0
    declined: int = 0
    queries: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    dropped: int = 0


class _Stop:
    """Somebody asked the agent to leave."""


class Agent:
    """One device, from its first connection to the end of a run.

    Args:
        state: Open state folder; closed by the caller.
        hello: How the device introduces itself, with the state's session.
        load_data: Gives its samples, see :class:`~.worker.Worker`.
        connection: The broker.
        limits: What the board allows.
        service: The service manager, which hears that the agent's loop turns, whatever the worker computes.
        federation: Its federation.
        retry_s: Time after which an unanswered request is repeated.
        say: Takes one line for people at every change of phase.
        run_key: Opens what the server signs; without it nothing is signed.

    Raises:
        ConfigError: URL, credentials or TLS files cannot be used.
    """

    def __init__(
        self,
        state: DeviceState,
        hello: Hello,
        load_data: Callable[[tuple[int, ...], int], Dataset],
        connection: Connection,
        limits: Limits,
        *,
        service: ServiceManager | None = None,
        federation: str = "default",
        retry_s: float = RETRY_S,
        say: Callable[[str], None] = _log.info,
        run_key: RunKey | None = None,
    ) -> None:
        self._state, self._federation, self._say = state, federation, say
        self._timeout_s, self._run_key = connection.timeout_s, run_key
        self._events: Inbox[TransportEvent | machine.DeviceEvent | FedzoError | _Stop] = Inbox(
            INBOX_MESSAGES, INBOX_BYTES
        )
        self._device = Device(hello, outbox=state.outbox.load(), retry_s=retry_s)
        self._worker = Worker(load_data, state.blobs, self._events.put, limits, state.residuals)
        self._limits, self._service = limits, service or ServiceManager({})
        self._summary = Summary(state.device, state.session)
        self._pending: dict[tuple[Channel, bytes], int] = {}
        self._linked = False
        self._doing: ReportKind | None = None
        username = connection.username
        if username is None and connection.password is not None:
            username = state.device
        lost = Presence(state.session, "lost").encode()
        self._transport = MqttTransport(
            connection.url,
            state.device,
            on_event=self._events.put,
            subscriptions=device_subscriptions(federation, state.device),
            username=username,
            password=connection.password,
            tls=connection.tls,
            will=Will(self._topic(Channel.STATE), lost),
            max_packet_bytes=MAX_PAYLOAD_BYTES + _PACKET_OVERHEAD_BYTES,
            max_queued_bytes=OUTGOING_BYTES,
            may_read=self._events.has_room,
        )
        self._news = LinkNews(say, str(self._transport.endpoint), federation, state.device)

    @property
    def summary(self) -> Summary:
        """What was done so far; complete once :meth:`run` has ended."""
        replica, traffic = self._device.replica, self._transport.traffic
        return dataclasses.replace(
            self._summary,
            log_length=replica.index if replica else 0,
            weights_digest=replica.digest.hex() if replica else "",
            layout=self._worker.layout,
            provider=provider_in_use(),
            peak_rss_mib=peak_rss_mib(),
            bytes_up=traffic.bytes_up,
            bytes_down=traffic.bytes_down,
        )

    def stop(self) -> None:
        """Ask :meth:`run` to return soon; safe in a signal handler and from any thread."""
        self._events.put(_Stop())

    def run(self) -> None:
        """Take part until the run is done or :meth:`stop` is called.

        Raises:
            BrokerError: The broker could not be reached in time, or it refused this device for good.
            MemoryBudgetError: The run does not fit.
            FedzoError: The device or the server refused.
        """
        self._worker.start()
        threading.Thread(target=self._connect, name="fedzo-connect", daemon=True).start()
        self._service.ready()
        try:
            while not self._device.finished:
                item = self._next()
                if isinstance(item, _Stop):
                    self._leave()
                    return
                if isinstance(item, FedzoError):
                    raise item
                event = self._translate(item)
                if event is not None:
                    self._carry_out(self._device.on(event, time.monotonic()))
        finally:
            self._service.stopping()
            self._worker.close()
            self._transport.close(timeout_s=FLUSH_S)

    def _leave(self) -> None:
        """Tell the server at once; without a link the broker's will has told it already."""
        self._summary.status = "left"
        if self._linked:
            self._send(Channel.STATE, Presence(self._state.session, "left").encode())

    def _connect(self) -> None:
        try:
            self._transport.connect(self._timeout_s)
        except FedzoError as error:
            self._events.put(error)

    # --- events -----------------------------------------------------------------------------------------------------

    def _next(self) -> TransportEvent | machine.DeviceEvent | FedzoError | _Stop:
        wakeup = self._device.wakeup
        if self._run_key is not None and (early := self._run_key.early()) is not None:
            return early
        while True:
            self._service.feed()
            self._news.look()
            waits = [] if wakeup is None else [max(0.0, wakeup - time.monotonic())]
            waits += [due for due in (self._service.interval_s, self._news.wait_s) if due is not None]
            try:
                return self._events.get(timeout=min(waits, default=None))
            except queue.Empty:
                if wakeup is not None and time.monotonic() >= wakeup:
                    return machine.Tick()

    def _translate(self, item: TransportEvent | machine.DeviceEvent) -> machine.DeviceEvent | None:
        if isinstance(item, Arrived):
            return self._read(item)
        if isinstance(item, Connected):
            self._news.connected()
            self._linked = True
            return machine.Connected()
        if isinstance(item, Disconnected):
            self._news.disconnected(item)
            self._linked = False
            return machine.Disconnected()
        if isinstance(item, Rejected):
            _log.warning("the broker did not take a message: %s", item.reason)
            return None
        if isinstance(item, machine.Planned):
            self._summary.planned_peak_mib = item.peak_mib
            budget = self._limits.ram_budget_mib
            self._say(
                f"run {item.run} fits: planned peak {item.peak_mib:.1f} MiB, budget {budget:g} MiB,"
                f" micro-batch {item.micro_batch}, {self._worker.loading}"
            )
        if isinstance(item, machine.OverBudget):
            _log.warning("this device cannot compute as planned: %s", item.detail)
        if isinstance(item, machine.Computed) and item.outcome is not None:
            self._summary.reports += 1
            self._summary.queries += item.outcome.queries
            self._log_report(item.outcome)
            if item.outcome.decline:
                self._summary.declined += 1
                _log.warning("this device could not answer: %s", item.outcome.detail, extra={"event": "declined"})
        return item if isinstance(item, machine.DeviceEvent) else None

    def _log_report(self, outcome: machine.Outcome) -> None:
        numbers = {"queries": outcome.queries, "elapsed_ms": outcome.elapsed_ms, "mean_loss": outcome.mean_loss}
        known = {"event": "report", "run": self._summary.run, "fields": numbers}
        _log.info("%d forward passes in %d ms", outcome.queries, outcome.elapsed_ms, extra=known)

    def _read(self, arrived: Arrived) -> machine.Received | None:
        if arrived.retain and not arrived.payload:
            return None  # A retained message was removed.
        try:
            payload = arrived.payload if self._run_key is None else self._run_key.open(arrived)
            if payload is None:
                return None
            received = read_message(self._federation, self._state.device, arrived.topic, payload)
        except ProtocolError as error:
            self._summary.dropped += 1
            dropped = self._summary.dropped
            if dropped & (dropped - 1) == 0:  # Powers of two: a flood must not fill the log.
                _log.warning("dropped a payload on %s (%d so far): %s", arrived.topic[:120], dropped, error.message)
            return None
        if isinstance(received.message, RunDocument):
            self._summary.run = received.message.run
        elif isinstance(received.message, ServerPresence):
            self._news.heard_of_server(online=received.message.online)
        return received

    # --- commands ---------------------------------------------------------------------------------------------------

    def _carry_out(self, commands: list[machine.DeviceCommand]) -> None:
        for command in commands:
            if isinstance(command, machine.Send):
                self._send(command.channel, command.message.encode())
            elif isinstance(command, (machine.FindBlob, machine.StoreBlob)):
                self._events.put(self._blob(command))
            elif isinstance(command, (machine.Plan, machine.Prepare, machine.GiveBack)):
                self._worker.submit(command)
            elif isinstance(command, machine.Compute):
                self._announce(command.task)
                self._worker.submit(command)
            elif isinstance(command, machine.Cancel):
                self._worker.cancel()
            elif isinstance(command, (machine.SaveReport, machine.DropReport)):
                self._keep(command)
            else:
                self._summary.status = "done" if command.error is None else "refused"
                if command.error is not None:
                    raise command.error

    def _send(self, channel: Channel, payload: bytes) -> None:
        """Publish, unless the same message still waits for the broker."""
        transport, retain = self._transport, channel in RETAINED
        self._pending = {key: number for key, number in self._pending.items() if transport.is_pending(number)}
        if (channel, payload) in self._pending:
            return
        if retain:  # What is retained replaces: an older message must not count as this one's equal later.
            self._pending = {key: number for key, number in self._pending.items() if key[0] is not channel}
        try:
            self._pending[channel, payload] = transport.publish(self._topic(channel), payload, retain=retain)
        except BrokerError as error:
            _log.debug("not sent: %s", error.message)  # Refused for good just now; the reason is on its way here.

    def _blob(self, command: machine.FindBlob | machine.StoreBlob) -> machine.DeviceEvent:
        store, sha256 = self._state.blobs, command.sha256
        try:
            if isinstance(command, machine.StoreBlob):
                store.put(command.data, expected=sha256)
                return machine.BlobFound(sha256, True, command.data if command.read else b"")
            if sha256 not in store:
                return machine.BlobFound(sha256, False)
            data = store.get(sha256)  # Read in any case: a damaged one is fetched again now, not refused later.
            return machine.BlobFound(sha256, True, data if command.read else b"")
        except ArtifactError as error:
            _log.warning("%s", error.message)
            return machine.BlobFound(sha256, False)
        except ConfigError as error:
            if not (isinstance(command, machine.StoreBlob) and command.optional):
                return machine.Failed(error)
            _log.warning("going on without an optional file: %s", error.message)
            return machine.BlobFound(sha256, False)

    def _keep(self, command: machine.SaveReport | machine.DropReport) -> None:
        try:
            if isinstance(command, machine.SaveReport):
                self._state.outbox.save(command.run, command.report)
            else:
                self._state.outbox.drop(is_lost=command.is_lost)
        except OSError as error:
            # The report is still sent; only a crash right now would lose it, or give back what it carried.
            _log.warning("the outbox %s: %s", self._state.outbox.path, error.strerror or error)

    def _announce(self, task: machine.Task) -> None:
        if task.kind is not self._doing:
            self._doing = task.kind
            self._say(f"{_WORK[task.kind]} from round {task.round}, on {provider_in_use()}")

    def _topic(self, channel: Channel) -> str:
        return topic(self._federation, channel, self._state.device)

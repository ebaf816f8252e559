"""The device's half of the round, without I/O: ``on(event, now) -> commands``.

The machine is level-triggered. Events change facts; then :meth:`Device._advance` compares the facts with what the
retained documents ask for and takes the first step that is missing. A message that is lost, repeated, delayed or
reordered therefore needs no transition of its own: the next event, or the next tick, finds the same step missing.

=============  ============================================  ===================================
stage          what is missing                               step taken
=============  ============================================  ===================================
``offline``    the link                                      wait
``waiting``    the run document                              wait
``greeting``   the server's welcome                          send the hello
``fetching``   the manifest, a graph, the mask               find it, or pull its blocks
``planning``   a memory plan that fits                       plan
``preparing``  an engine for the mask                        open it
``following``  update records                                pull them and replay
``reporting``  the receipt of a report                       send the report
``computing``  the outcome of a task                         wait, cancel if the round is over
``idle``       nothing                                       wait for the next round
``done``       nothing, for ever                             leave
=============  ============================================  ===================================
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from .blobs import BlobFetcher
from .device_events import (
    BlobFound,
    Cancel,
    Compute,
    Computed,
    Connected,
    DeviceCommand,
    DeviceEvent,
    Disconnected,
    DropReport,
    Failed,
    Finish,
    Plan,
    Planned,
    Prepare,
    Prepared,
    Received,
    SaveReport,
    Send,
    Task,
)
from .documents import (
    Announcement,
    Hello,
    Order,
    Phase,
    Presence,
    RunDocument,
    ServerPresence,
    Status,
    unpack_participants,
)
from .errors import ArtifactError, FedzoError, MemoryBudgetError, ProtocolError, SelfTestError
from .manifest import Manifest
from .mask import Mask
from .messages import Receipt, Report, ReportKind, UpdateRecord
from .settings import positions_of
from .topics import Channel
from .transfers import BlobBlock, LogRequest, LogSlice
from .update import Replica

__all__ = ["RETRY_S", "Device"]

RETRY_S = 5.0
PRESENCE_S = 60.0
LOG_REQUEST_RECORDS = 1024
_KINDS: dict[Phase, ReportKind] = {
    "saliency": ReportKind.SALIENCY,
    "train": ReportKind.PROBE,
    "evaluate": ReportKind.EVALUATE,
}


class Device:
    """One device in one federation.

    Args:
        hello: How it introduces itself; carries the session.
        outbox: A report that an earlier session could not deliver, with its run id.
        retry_s: Time after which an unanswered request is repeated.

    Attributes:
        stage: What it is doing, a word of the module's table.
        replica: Its weights once a run is known; updated in place.
        finished: Whether :class:`Finish` was given.
    """

    def __init__(self, hello: Hello, *, outbox: tuple[str, Report] | None = None, retry_s: float = RETRY_S) -> None:
        self._hello = hello
        self._outbox = outbox
        self._retry_s = retry_s
        self._online = False
        self._server_birth = -1
        self._presence = Presence(hello.session, "joining")
        self._sent: dict[str, float] = {}
        self._out: list[DeviceCommand] = []
        self._tasks = 0
        self._now = 0.0
        self.stage = "offline"
        self.finished = False
        self._forget_run()

    def _forget_run(self) -> None:
        self._run: RunDocument | None = None
        self._head: Announcement | None = None
        self._is_enrolled = False
        self._ordinal: int | None = None
        self._manifest: Manifest | None = None
        self._planned: float | None = None
        self._blobs = BlobFetcher(retry_s=self._retry_s)
        self._mask_data: tuple[str, bytes] = ("", b"")
        self._replica_mask: str | None = None
        self._prepared_mask: str | None = None
        self._computing: Task | None = None
        self._answered = -1
        self._divergences = 0
        self.replica: Replica | None = None

    @property
    def wakeup(self) -> float | None:
        """When the next ``Tick`` is due, if nothing else happens before.

        What is overdue already waits for something else than time, for example a hello for the run's document.
        """
        if not self._online or self.finished:
            return None
        times = [sent + self._period(key) for key, sent in self._sent.items()]
        if self._blobs.wakeup is not None:
            times.append(self._blobs.wakeup)
        return min((time for time in times if self._now < time < math.inf), default=None)

    def on(self, event: DeviceEvent, now: float) -> list[DeviceCommand]:
        """Take one event.

        Args:
            event: What happened.
            now: Any clock that does not go back, in seconds.

        Returns:
            Commands, to be carried out in order.
        """
        if self.finished:
            return []
        self._out, self._now = [], now
        try:
            self._take(event, now)
            if not self.finished:
                self._advance(now)
        except ProtocolError as error:
            # A peer's bad message changes nothing: replicas roll back, documents were checked before they count.
            self._say(self._presence.status, detail=error.message[:200])
        return self._out

    # --- facts --------------------------------------------------------------------------------------------------

    def _take(self, event: DeviceEvent, now: float) -> None:
        if isinstance(event, Connected):
            self._online = True
            # Requests may be lost with the old link; what this machine itself works on is not.
            self._sent = {key: sent for key, sent in self._sent.items() if math.isinf(sent)}
            self._blobs.forget_requests()
            self._sent["presence"] = now
            self._out.append(Send(Channel.STATE, self._presence))
        elif isinstance(event, Disconnected):
            self._online = False
        elif isinstance(event, Received):
            self._receive(event)
        elif isinstance(event, BlobFound):
            self._blob_found(event)
        elif isinstance(event, Planned) and self._run is not None and event.run == self._run.run:
            self._planned = event.peak_mib
            self._sent.pop("plan", None)
        elif isinstance(event, Prepared) and self._run is not None and event.run == self._run.run:
            self._prepared_mask = event.mask_sha256
            self._sent.pop("prepare", None)
        elif isinstance(event, Failed) and (not event.run or (self._run is not None and event.run == self._run.run)):
            self._refuse(event.error)
        elif isinstance(event, Computed):
            self._computed(event)

    def _receive(self, event: Received) -> None:
        message = event.message
        if isinstance(message, RunDocument):
            if self._run is None or self._run != message:
                self._start_run(message)
        elif isinstance(message, ServerPresence):
            if message.online and message.birth != self._server_birth:
                self._server_birth = message.birth
                self._out.append(Send(Channel.STATE, self._presence))
        elif isinstance(message, Order):
            self._obey(message)
        elif isinstance(message, Announcement):
            if self._head is None or message.run != self._head.run or message.round >= self._head.round:
                self._head = message
        elif isinstance(message, UpdateRecord):
            self._replay((message,))
        elif isinstance(message, LogSlice):
            self._sent.pop("log", None)
            self._replay(message.records)
        elif isinstance(message, Receipt):
            if self._outbox is not None and self._outbox[1].round == message.round:
                self._answered = max(self._answered, message.round)  # also by an earlier session
                self._drop_outbox()
        elif isinstance(message, BlobBlock):
            self._out += self._blobs.add(message)

    def _start_run(self, run: RunDocument) -> None:
        head = self._head
        if self._computing is not None:
            self._out.append(Cancel())
        self._forget_run()
        self._sent.clear()
        self._run = run
        self._head = head if head is not None and head.run == run.run else None
        if self._outbox is not None and self._outbox[0] != run.run:
            self._drop_outbox()
        self._say("joining")

    def _obey(self, order: Order) -> None:
        if self._run is None or order.run != self._run.run or order.session != self._hello.session:
            return
        if order.action == "refuse":
            self._refuse(ProtocolError(f"the server refuses this device: {order.detail}"))
            return
        self._is_enrolled = True
        if order.action == "welcome":
            self._ordinal = order.ordinal
        self._sent.pop("hello", None)

    def _replay(self, records: tuple[UpdateRecord, ...]) -> None:
        for record in records:
            if self.replica is None or record.index != self.replica.index:
                continue
            try:
                self.replica.apply(record)
            except ProtocolError as error:
                self._diverged(error.message)
                return

    def _diverged(self, detail: str) -> None:
        """Start over from the seed; a second failure in a row means that this machine computes something else."""
        self._divergences += 1
        if self._divergences > 1 or self.replica is None:
            self._refuse(SelfTestError(f"replaying the log fails: {detail}", hint="run fedzo-device doctor"))
            return
        self.replica.restore_from_start()
        self._sent.pop("log", None)

    def _computed(self, event: Computed) -> None:
        task, outcome = self._computing, event.outcome
        if task is None or task.number != event.number:
            return
        self._computing = None
        if outcome is None or self._run is None or self.replica is None:
            return
        report = Report(
            kind=task.kind,
            round=task.round,
            session=self._hello.session,
            samples=outcome.samples,
            weights_digest=self.replica.digest,
            mean_loss=outcome.mean_loss,
            queries=outcome.queries,
            elapsed_ms=outcome.elapsed_ms,
            peak_rss_kib=outcome.peak_rss_kib,
            blocks=outcome.blocks,
            decline=outcome.decline,
        )
        self._answered = max(self._answered, task.round)
        if self._head is None or task.round < self._head.round:
            return  # The round closed without us.
        self._outbox = (self._run.run, report)
        self._sent.pop("report", None)
        self._out.append(SaveReport(self._run.run, report))
        if outcome.detail:
            self._say(self._presence.status, detail=outcome.detail[:200])

    # --- steps --------------------------------------------------------------------------------------------------

    def _advance(self, now: float) -> None:
        self.stage = "offline"
        if not self._online:
            return
        self.stage = "waiting"
        if self._run is None:
            return
        starts = self._head is not None and self._head.run == self._run.run and self._head.phase != "enrol"
        if not self._is_enrolled or (self._ordinal is None and starts):
            self.stage = "greeting"
            if self._due("hello", now):
                self._out.append(Send(Channel.HELLO, self._hello))
            return
        self._deliver(now)
        if self._due("presence", now):
            self._out.append(Send(Channel.STATE, self._presence))  # A broker may lose even what it retained.
        if self._computing is not None and self._head is not None and self._computing.round != self._head.round:
            self._out.append(Cancel())
        if self._artifact_missing(now) or self._head is None or self._head.run != self._run.run:
            return
        if self._mask_missing(now) or self._behind(self._head, now):
            return
        self._work(self._run, self._head, now)

    def _deliver(self, now: float) -> None:
        if self._outbox is None:
            return
        report = self._outbox[1]
        if self._head is not None and self._head.round > report.round:
            self._drop_outbox()
        elif self._due("report", now):
            self._out.append(Send(Channel.REPORT, report))

    def _artifact_missing(self, now: float) -> bool:
        """Fetch the manifest, plan, fetch the graphs, in this order: a plan that does not fit loads nothing."""
        assert self._run is not None
        if self._manifest is None:
            self._fetch(bytes.fromhex(self._run.manifest_sha256), self._run.manifest_size, now, read=True)
            return True
        if self._planned is None:
            self.stage = "planning"
            if "plan" not in self._sent:
                self._sent["plan"] = math.inf
                self._out.append(Plan(self._run, self._manifest))
            return True
        for graph in self._manifest.graphs:
            if not self._blobs.has(graph.sha256):
                self._fetch(graph.sha256, graph.size, now, read=False)
                return True
        if self._presence.status == "joining":
            self._say("ready")
        return False

    def _mask_missing(self, now: float) -> bool:
        """Get the announced mask, the replica that starts from it, and an engine for it."""
        assert self._run is not None and self._manifest is not None and self._head is not None
        wanted = self._head.mask_sha256
        if self._replica_mask != wanted:
            if wanted and self._mask_data[0] != wanted:
                self._fetch(bytes.fromhex(wanted), self._head.mask_size, now, read=True)
                return True
            layout = self._manifest.layout
            mask = Mask.decode(self._mask_data[1], layout) if wanted else Mask.dense(layout)
            self._mask, self._mask_data = mask, ("", b"")
            settings = self._run.training
            self.replica = Replica(
                layout, mask, self._manifest.seed, self._run.settings.seed, settings.directions, settings.optimiser
            )
            self._replica_mask, self._divergences = wanted, 0
        if self._prepared_mask != wanted and self._head.phase in _KINDS:
            self.stage = "preparing"
            if "prepare" not in self._sent:
                self._sent["prepare"] = math.inf
                self._out.append(Prepare(self._run, self._manifest, self._mask, wanted))
            return True
        return False

    def _behind(self, head: Announcement, now: float) -> bool:
        """Replay up to the announced log; the chain digest proves that it is the same log."""
        assert self.replica is not None
        if not head.log_head:
            return False
        if self.replica.index > head.log_length:
            # An update comes before the head that counts it; a head that stays behind is of a server that lost some.
            self.stage = "following"
            if now - self._sent.setdefault("ahead", now) >= self._retry_s:
                del self._sent["ahead"]
                self._diverged(f"the server's log has {head.log_length} records, this one {self.replica.index}")
            return True
        self._sent.pop("ahead", None)
        if self.replica.index == head.log_length and self.replica.head.hex() != head.log_head:
            self._diverged(f"the log of {head.log_length} records has another head here")
            if self.finished:
                return True
        if self.replica.index < head.log_length:
            self.stage = "following"
            if self._due("log", now):
                count = min(LOG_REQUEST_RECORDS, head.log_length - self.replica.index)
                self._out.append(Send(Channel.GET, LogRequest(self.replica.index, count)))
            return True
        self._sent.pop("log", None)
        self._divergences = 0
        return False

    def _work(self, run: RunDocument, head: Announcement, now: float) -> None:
        assert self.replica is not None
        self.stage = "idle"
        if self._computing is not None:
            self.stage = "computing"
            return
        if head.phase == "done":
            self.stage = "done"
            self._say("done")
            self._finish(None)
            return
        if self._outbox is not None:
            self.stage = "reporting"
            return
        if head.phase not in _KINDS or head.round <= self._answered or self._ordinal is None:
            return
        members = unpack_participants(head.participants)
        rank = int(np.searchsorted(members, self._ordinal))
        if rank == members.size or members[rank] != self._ordinal:
            return
        positions = np.zeros(0, dtype=np.int64)
        if head.phase == "train":
            positions = positions_of(run.training.assignment, head.round, head.cursor, head.k, rank, members.size)
        self.stage = "computing"
        self._tasks += 1
        self._computing = Task(
            self._tasks, _KINDS[head.phase], head.round, self._ordinal, positions, self.replica.weights.copy()
        )
        self._out.append(Compute(self._computing))

    # --- blobs --------------------------------------------------------------------------------------------------

    def _fetch(self, sha256: bytes, size: int, now: float, *, read: bool) -> None:
        self.stage = "fetching"
        self._out += self._blobs.fetch(sha256, size, now, read=read)

    def _blob_found(self, event: BlobFound) -> None:
        self._blobs.found(event)
        if not event.present or self._run is None:
            return
        if self._manifest is None and event.sha256.hex() == self._run.manifest_sha256:
            try:
                self._manifest = Manifest.decode(event.data)
            except ArtifactError as error:
                self._refuse(error)
        elif self._head is not None and event.sha256.hex() == self._head.mask_sha256:
            self._mask_data = (event.sha256.hex(), event.data)

    # --- small --------------------------------------------------------------------------------------------------

    def _due(self, key: str, now: float) -> bool:
        """Whether to send what ``key`` stands for now; notes the time if so."""
        if now < self._sent.get(key, -math.inf) + self._period(key):
            return False
        self._sent[key] = now
        return True

    def _period(self, key: str) -> float:
        return max(PRESENCE_S, self._retry_s) if key == "presence" else self._retry_s

    def _drop_outbox(self) -> None:
        self._outbox = None
        self._sent.pop("report", None)
        self._out.append(DropReport())

    def _say(self, status: Status, *, detail: str = "") -> None:
        replica = self.replica
        self._presence = dataclasses.replace(
            self._presence,
            status=status,
            run=self._run.run if self._run else "",
            detail=detail,
            log_length=replica.index if replica else 0,
            weights_digest=replica.digest.hex() if replica else "",
            planned_peak_mib=self._planned or 0.0,
        )
        if self._online:
            self._sent["presence"] = self._now
            self._out.append(Send(Channel.STATE, self._presence))

    def _refuse(self, error: FedzoError) -> None:
        kind = "does not fit: " if isinstance(error, MemoryBudgetError) else ""
        self._say("refused", detail=f"{kind}{error.message}"[:500])
        self._finish(error)

    def _finish(self, error: FedzoError | None) -> None:
        self.finished = True
        if self._computing is not None:
            self._out.append(Cancel())
        self._out.append(Finish(error))

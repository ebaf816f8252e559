"""The device's half of the round, without I/O: ``on(event, now) -> commands``.

The machine is level-triggered. Events change facts; then :meth:`Device._advance` compares the facts with what the
retained documents ask for and takes the first step that is missing. A message that is lost, repeated, delayed or
reordered therefore needs no transition of its own: the next event, or the next tick, finds the same step missing.

=============  ============================================  ===================================
stage          what is missing                               step taken
=============  ============================================  ===================================
``offline``    the link                                      wait
``waiting``    the run document, or the open round           wait
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

from ..errors import ArtifactError, ConfigError, FedzoError, MemoryBudgetError, ProtocolError, SelfTestError
from ..pruning.mask import Mask
from ..repeater import Backoff, Repeater
from ..replay.update import Replica
from ..wire.documents import Announcement, Hello, Order, Presence, RunDocument, ServerPresence, Status, one_line
from ..wire.messages import KINDS, Decline, Receipt, Report, UpdateRecord
from ..wire.topics import Channel
from ..wire.transfers import BlobBlock, LogSlice, SnapshotOffer
from .delivery import Delivery
from .device_events import (
    BlobFound,
    Cancel,
    Compute,
    Computed,
    Connected,
    DeviceCommand,
    DeviceEvent,
    Disconnected,
    Failed,
    Finish,
    Outcome,
    OverBudget,
    Planned,
    Prepared,
    Received,
    Send,
    Task,
)
from .log_follower import LogFollower
from .parts import Parts
from .preparation import Preparation
from .run_files import RunFiles
from .tasks import is_wanted, make_report, make_task

__all__ = ["RETRY_S", "Device"]

RETRY_S = 5.0
PRESENCE_S = 60.0
_OWN = Parts()


class Device:
    """One device in one federation.

    Args:
        hello: How it introduces itself; carries the session.
        outbox: A report that an earlier session could not deliver, with its run id.
        retry_s: Time after which an unanswered request is repeated.
        parts: Builds manifest, masks and weights; anew for every device unless it is told otherwise.

    Attributes:
        stage: What it is doing, a word of the module's table.
        finished: Whether :class:`Finish` was given.
    """

    def __init__(
        self, hello: Hello, *, outbox: tuple[str, Report] | None = None, retry_s: float = RETRY_S, parts: Parts = _OWN
    ) -> None:
        self._hello, self._parts, self._retry_s = hello, parts, retry_s
        self._delivery = Delivery(outbox, retry_s=retry_s)
        self._online, self._server_birth = False, -1
        self._presence = Presence(hello.session, "joining")
        self._greeting, self._reminder = Repeater(retry_s), Repeater(retry_s)
        self._heartbeat, self._knock = Repeater(max(PRESENCE_S, retry_s)), Backoff(retry_s, PRESENCE_S)
        self._out: list[DeviceCommand] = []
        self._tasks, self._now = 0, 0.0
        self.stage, self.finished = "offline", False
        self._forget_run()

    def _forget_run(self) -> None:
        self._run: RunDocument | None = None
        self._head: Announcement | None = None
        self._other_head: Announcement | None = None
        self._is_enrolled = self._is_cancelled = False
        self._ordinal: int | None = None
        self._files: RunFiles | None = None
        self._preparation: Preparation | None = None
        self._followed_mask: str | None = None
        self._computing: Task | None = None
        self._follower: LogFollower | None = None

    @property
    def replica(self) -> Replica | None:
        """Its weights once a run and a mask are known; updated in place."""
        return self._follower.replica if self._follower else None

    @property
    def wakeup(self) -> float | None:
        """When the next ``Tick`` is due, if nothing else happens before.

        What is overdue already waits for something else than time, for example a hello for the run's document.
        """
        if not self._online or self.finished:
            return None
        reminder = self._reminder if self._preparation is not None and self._preparation.is_over_budget else None
        parts = (self._greeting, self._knock, self._delivery, self._heartbeat, reminder, self._files, self._follower)
        times = (part.wakeup for part in parts if part is not None)
        return min((time for time in times if time is not None and time > self._now), default=None)

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
        if now < self._now:  # A clock was set back: nothing would be repeated for as long.
            self._forget_requests()
        self._out, self._now = [], now
        try:
            self._take(event, now)
            if not self.finished:
                self._advance(now)
        except ProtocolError as error:
            # A peer's bad message changes nothing: replicas roll back, documents were checked before they count.
            if one_line(error.message) != self._presence.detail:
                self._say(self._presence.status, detail=error.message)
        except (ArtifactError, ConfigError, SelfTestError) as error:
            self._refuse(error)
        return self._out

    # --- facts --------------------------------------------------------------------------------------------------

    def _take(self, event: DeviceEvent, now: float) -> None:
        if isinstance(event, Connected):
            self._online = True
            self._forget_requests()
            self._knock.start(now)
            self._say(self._presence.status, detail=self._presence.detail)
        elif isinstance(event, Disconnected):
            self._online = False
        elif isinstance(event, Received):
            self._receive(event)
        elif isinstance(event, BlobFound) and self._files is not None:
            self._files.found(event)
        elif isinstance(event, (Planned, Prepared, OverBudget)) and self._preparation is not None:
            self._preparation.take(event)
        elif isinstance(event, Failed) and (not event.run or (self._run is not None and event.run == self._run.run)):
            self._refuse(event.error)
        elif isinstance(event, Computed):
            self._computed(event)

    def _receive(self, event: Received) -> None:
        message = event.message
        if isinstance(message, RunDocument) and message != self._run:
            self._start_run(message)
        elif isinstance(message, ServerPresence):
            self._delivery.hear_server(message.online)
            if message.online and message.birth != self._server_birth:
                self._server_birth = message.birth
                self._forget_requests(reports=False)  # those wait at the broker
                self._say(self._presence.status, detail=self._presence.detail)
        elif isinstance(message, Order):
            self._obey(message)
        elif isinstance(message, Announcement):
            self._announced(message)
        elif isinstance(message, UpdateRecord) and self._follower is not None:
            self._follower.hear(message)
        elif isinstance(message, (LogSlice, SnapshotOffer)) and self._follower is not None:
            self._follower.read(message)
        elif isinstance(message, Receipt):
            self._out += self._delivery.take(message)
        elif isinstance(message, BlobBlock):
            for part in (self._files, self._follower):
                self._out += part.add(message) if part is not None else []

    def _announced(self, head: Announcement) -> None:
        if self._run is None or head.run != self._run.run:
            self._other_head = head  # Of the next run perhaps: retained documents come in any order.
        elif self._head is None or head.round >= self._head.round:
            self._head = head

    def _start_run(self, run: RunDocument) -> None:
        heads = (self._head, self._other_head)
        self._cancel()
        self._forget_run()
        self._forget_requests()
        self._run, self._preparation = run, Preparation(run)
        self._files = RunFiles(run, retry_s=self._retry_s, parts=self._parts)
        self._head = next((head for head in heads if head is not None and head.run == run.run), None)
        self._out += self._delivery.start_run(run)
        self._say("joining")

    def _obey(self, order: Order) -> None:
        run = self._run
        if self._preparation is None or run is None or (order.run, order.session) != (run.run, self._hello.session):
            return
        self._greeting.forget()
        if order.action == "introduce":
            self._head = None  # Its round may be larger than those to come.
            self._start_run(run)
        elif order.action == "refuse":
            self._refuse(ProtocolError(f"the server refuses this device: {order.detail}"))
        elif order.action == "excuse":
            self._refuse(MemoryBudgetError(order.detail, hint="use a smaller model, or allow it more memory"))
        if order.action not in ("enrol", "welcome"):
            return
        if order.micro_batch and self._preparation.limit(order.micro_batch):
            self._cancel()
        self._is_enrolled = True
        if order.action == "welcome":
            self._ordinal = order.ordinal

    def _computed(self, event: Computed) -> None:
        task, outcome = self._computing, event.outcome
        if task is None or task.number != event.number:
            return
        self._computing, self._is_cancelled = None, False
        if outcome is None or self._run is None or self._preparation is None:
            return
        if outcome.decline is Decline.OVER_BUDGET:
            self._preparation.over_budget(self._run.run, outcome.detail)
        if self._head is not None and is_wanted(task, self._run, self._head):
            self._report(self._run, self._preparation, task, outcome)
        else:  # The round closed without us.
            self._out += self._delivery.give_back(task.kind, task.round)

    def _report(self, run: RunDocument, preparation: Preparation, task: Task, outcome: Outcome) -> None:
        self._out += self._delivery.put(
            run, make_report(run, task, outcome, self._hello.session, preparation.micro_batch)
        )
        if outcome.detail:
            self._say(self._presence.status, detail=outcome.detail)

    # --- steps --------------------------------------------------------------------------------------------------

    def _advance(self, now: float) -> None:
        self.stage = "offline"
        if not self._online:
            return
        self.stage = "waiting"
        if (self._run is None or (self._is_enrolled and self._head is None)) and self._knock.is_due(now):
            self._out.append(Send(Channel.HELLO, self._hello))  # What a broker did not keep, the server says again.
        if self._run is None or self._files is None or self._preparation is None:
            return
        starts = self._head is not None and self._head.phase != "enrol"
        if not self._is_enrolled or (self._ordinal is None and starts):
            self.stage = "greeting"
            if self._greeting.is_due(now):
                self._out.append(Send(Channel.HELLO, self._hello))
            return
        self._out += self._delivery.steps(self._head, now)
        if self._heartbeat.is_due(now):  # A broker may lose even what it retained.
            self._say(self._presence.status, detail=self._presence.detail)
        if self._computing is not None and self._head and not is_wanted(self._computing, self._run, self._head):
            self._cancel()
        run, files, preparation, head = self._run, self._files, self._preparation, self._head
        if self._artifact_missing(preparation, files, now):
            return
        self.stage = "waiting"
        if head is None or head.phase == "enrol" or self._mask_missing(run, files, preparation, head, now):
            return  # A replica of the dense weights may never be needed.
        if self._follower is not None and not self._is_behind(self._follower, head, now):
            self._work(run, preparation, head, self._follower)

    def _artifact_missing(self, preparation: Preparation, files: RunFiles, now: float) -> bool:
        """Fetch the manifest, plan, fetch the graphs, in this order: a plan that does not fit loads nothing."""
        self.stage = "fetching"
        if files.manifest is None:
            self._out += files.pull_manifest(now)
            return True
        if (steps := preparation.plan(files.manifest)) is not None:
            self.stage = "planning"
            self._out += steps
            return True
        if (steps := files.pull_graphs(preparation.files, now)) is not None:
            self._out += steps
            return True
        if self._presence.status == "joining" or self._presence.micro_batch != preparation.micro_batch:
            self._say("ready")
        return False

    def _mask_missing(
        self, run: RunDocument, files: RunFiles, preparation: Preparation, head: Announcement, now: float
    ) -> bool:
        """Get the announced mask, the replica that starts from it, and an engine for it."""
        assert files.manifest is not None
        wanted, manifest = head.mask_sha256, files.manifest
        if self._followed_mask != wanted:
            found = files.pull_mask(head, manifest.layout, now)
            if not isinstance(found, Mask):
                self.stage = "fetching"
                self._out += found
                return True
            self._mask, replica = found, self._parts.replica(run, manifest, found)
            self._follower, self._followed_mask = LogFollower(replica, run.settings, retry_s=self._retry_s), wanted
        steps = preparation.open(manifest, self._mask, wanted) if head.phase in KINDS else None
        if steps is not None:
            self.stage = "preparing"
            self._out += steps
        return steps is not None

    def _is_behind(self, follower: LogFollower, head: Announcement, now: float) -> bool:
        """Ask for the update records up to the announced log, if there is anything to ask for."""
        if follower.has_reached(head):
            return False
        self.stage = "idle" if follower.is_ahead(head) else "following"
        self._out += [Send(Channel.GET, request) for request in follower.requests(head, now)]
        return True

    def _work(self, run: RunDocument, preparation: Preparation, head: Announcement, follower: LogFollower) -> None:
        if self._computing is not None:
            self.stage = "computing"
        elif head.phase == "done":
            self.stage = "done"
            self._say("done")
            self._finish(None)
        elif self._delivery.is_waiting:
            self.stage = "reporting"
        else:
            self.stage = "idle"
            if preparation.is_over_budget and self._reminder.is_due(self._now):
                self._say(self._presence.status, detail=preparation.detail)  # until a smaller micro-batch is ordered
            if head.round <= self._delivery.answered or self._ordinal is None:
                return
            task = make_task(run, head, self._ordinal, self._tasks + 1, follower.replica, follower.recent)
            if task is not None and preparation.is_over_budget:
                self._tasks = task.number
                outcome = Outcome((), 0, decline=Decline.OVER_BUDGET, detail=preparation.detail)
                self._report(run, preparation, task, outcome)
                self._out += self._delivery.steps(head, self._now)
                self.stage = "reporting"
            elif task is not None:
                self.stage, self._tasks, self._computing = "computing", task.number, task
                self._out.append(Compute(task))
            elif head.phase in KINDS and self._reminder.is_due(self._now):
                # The server goes on without a device that missed a deadline, until it hears of it.
                self._say(self._presence.status, detail=self._presence.detail)

    # --- small --------------------------------------------------------------------------------------------------

    def _cancel(self) -> None:
        if self._computing is not None and not self._is_cancelled:
            self._is_cancelled = True
            self._out.append(Cancel())

    def _forget_requests(self, *, reports: bool = True) -> None:
        """Whatever was asked for may never come; what this machine itself works on will."""
        self._greeting.forget()
        for part in (self._delivery if reports else None, self._files, self._follower):
            if part is not None:
                part.forget_requests()

    def _say(self, status: Status, *, detail: str = "") -> None:
        replica = self.replica
        self._presence = dataclasses.replace(
            self._presence,
            status=status,
            run=self._run.run if self._run else "",
            detail=one_line(detail),
            round=max(self._head.round, self._delivery.answered + 1) if self._head else 0,
            log_length=replica.index if replica else 0,
            weights_digest=replica.digest.hex() if replica else "",
            planned_peak_mib=self._preparation.peak_mib if self._preparation else 0.0,
            micro_batch=self._preparation.micro_batch if self._preparation else 0,
        )
        if self._online:
            self._heartbeat.postpone(self._now)
            self._out.append(Send(Channel.STATE, self._presence))

    def _refuse(self, error: FedzoError) -> None:
        self._say("refused", detail="does not fit: " * isinstance(error, MemoryBudgetError) + error.message)
        self._finish(error)

    def _finish(self, error: FedzoError | None) -> None:
        self.finished = True
        self._cancel()
        self._out.append(Finish(error))

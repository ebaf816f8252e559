"""The server's half of the round, without I/O: ``on(event, now) -> commands``.

What the run does next is a function of what the journal holds (:meth:`Coordinator._next_phase`), so a restart needs
no state of its own: :meth:`Coordinator.restore` reads the entries back and the run goes on where they end.

============  ==========================================  ====================================
phase         lasts until                                 then
============  ==========================================  ====================================
``enrol``     enough devices are ready                    the first round
``saliency``  scores of a quorum                          a mask; after the last step, training
``train``     scalars of a quorum                         an update; every so often, evaluation
``evaluate``  devices and server have counted             training, or the end
``done``      every live device has the final weights     leave
============  ==========================================  ====================================

A round closes when every participant that is alive has answered and the quorum is met, or at the deadline with the
quorum. Under the quorum the deadline starts again; participants that cannot come back are replaced by a new round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import numpy as np

from .aggregation import average_blocks, combine_probes, evaluate_reports
from .codec import decode
from .coordinator_events import (
    Connected,
    CoordinatorCommand,
    CoordinatorEvent,
    DeviceSaid,
    Evaluate,
    Finish,
    OfferBlob,
    Record,
    RecordKind,
    Send,
    ServeBlob,
    ServeLog,
    ServerEvaluated,
)
from .documents import (
    Announcement,
    Hello,
    Order,
    Phase,
    Presence,
    RunDocument,
    ServerPresence,
    pack_participants,
    parse,
)
from .errors import FedzoError, ProtocolError, QuorumError
from .manifest import Manifest
from .mask import Mask, threshold
from .messages import Receipt, Report, UpdateRecord, Verdict
from .open_round import KINDS, OpenRound
from .roster import Member, Roster
from .saliency import diagonal_scores
from .topics import Channel
from .transfers import BlobRequest, LogRequest
from .update import Replica
from .wire import MAX_SCALARS

__all__ = ["Coordinator"]

_DONE = "done"


class Coordinator:
    """One run of one federation.

    Args:
        run: Run id, artifact and settings.
        manifest: The artifact.
        birth: Grows with every start of the server.
        has_test_set: Whether :class:`Evaluate` will be answered.

    Attributes:
        head: What is announced now.
        replica: The weights.
        mask: The survivors.
        roster: The devices.
        evaluations: What evaluation rounds found, oldest first.
        finished: Whether :class:`Finish` was given.
    """

    def __init__(self, run: RunDocument, manifest: Manifest, *, birth: int, has_test_set: bool = False) -> None:
        self.run = run
        self.manifest = manifest
        self.roster = Roster()
        self.evaluations: list[dict[str, float | int | str | None]] = []
        self.finished = False
        self.head = Announcement(run.run, 0, "enrol")
        self._settings = run.settings
        self._presence = ServerPresence(True, birth)
        self._has_test_set = has_test_set
        self._scored = 0
        self._evaluated_at = -1
        self._cursor = 0
        self._round: OpenRound | None = None
        self._failures = 0
        self._gather_until: float | None = None
        self._gather_target = self._settings.devices
        self._out: list[CoordinatorCommand] = []
        self._recorded_run = False
        self._set_mask(Mask.dense(manifest.layout), b"")

    def _set_mask(self, mask: Mask, encoded: bytes) -> None:
        self.mask, self._mask_size = mask, len(encoded)
        self._mask_sha256 = hashlib.sha256(encoded).hexdigest() if encoded else ""
        training = self.run.training
        self.replica = Replica(
            self.manifest.layout,
            mask,
            self.manifest.seed,
            self._settings.seed,
            training.directions,
            training.optimiser,
        )

    # --- the journal ----------------------------------------------------------------------------------------------

    def restore(self, entries: Iterable[tuple[RecordKind, int, str, bytes]]) -> list[CoordinatorCommand]:
        """Read the journal back, in order, before the first event.

        Args:
            entries: ``(kind, round, device, payload)`` as they were recorded.

        Returns:
            Blobs to offer again.

        Raises:
            ProtocolError: The journal belongs to another run, or replaying it gives other weights.
        """
        self._out = []
        for kind, round_, device, payload in entries:
            if kind == "run":
                if parse(RunDocument, payload) != self.run:
                    raise ProtocolError("the journal belongs to a run with other settings or another artifact")
                self._recorded_run = True
            elif kind == "enrolment":
                self.roster.enrol(device, parse(Hello, payload))
            elif kind == "announce":
                self.head = parse(Announcement, payload)
                if not self.roster.is_numbered:
                    self.roster.number()
                self._round = OpenRound(self.head, self.roster) if self.head.phase in KINDS else None
            elif kind == "report":
                message = decode(payload)
                if isinstance(message, Report) and self._round and round_ == self.head.round:
                    self._round.reports[device] = message
            elif kind == "mask":
                self._adopt_mask(payload)
            elif kind == "update":
                record = decode(payload)
                assert isinstance(record, UpdateRecord)
                self.replica.apply(record)
                self._advance_cursor()
            elif kind == "evaluation":
                self._adopt_evaluation(json.loads(payload))
            elif kind == "phase":
                self._adopt_end(device, payload)
            if kind in ("mask", "update", "evaluation"):
                self._round = None
        return self._out

    def _record(self, kind: RecordKind, payload: bytes, *, round_: int | None = None, device: str = "") -> None:
        self._out.append(Record(kind, self.head.round if round_ is None else round_, device, payload))

    # --- events ---------------------------------------------------------------------------------------------------

    @property
    def wakeup(self) -> float | None:
        """When the next ``Tick`` is due, if nothing else happens before."""
        return None if self.finished else self._round.deadline if self._round else self._gather_until

    def on(self, event: CoordinatorEvent, now: float) -> list[CoordinatorCommand]:
        """Take one event.

        Args:
            event: What happened.
            now: Any clock that does not go back, in seconds.

        Returns:
            Commands, to be carried out in order. What is recorded is durable before a later ``Send`` goes out.
        """
        if self.finished:
            return []
        self._out = []
        if not self._recorded_run:
            self._record("run", self.run.encode(), round_=0)
            self._recorded_run = True
        if self._round is None and self._gather_until is None:
            over = self.head.phase == "done"
            self._gather_until = now + (self._settings.deadline_s if over else self._settings.enrol_deadline_s)
        if self._round is not None and self._round.deadline is None:
            self._round.deadline = now + self._settings.deadline_s
        if isinstance(event, Connected):
            self._out += [Send(Channel.SERVER, self._presence), Send(Channel.RUN, self.run)]
            self._out.append(Send(Channel.HEAD, self.head))
            self._ask_server_to_evaluate()
        elif isinstance(event, DeviceSaid):
            self._hear(event)
        elif isinstance(event, ServerEvaluated) and self._round and event.round == self.head.round:
            self._round.server_result = event
        self._move(now)
        return self._out

    def _hear(self, event: DeviceSaid) -> None:
        message, member = event.message, self.roster.get(event.device)
        if isinstance(message, Hello):
            self._greet(event.device, message)
            return
        if member is None:
            return  # A stranger's report means nothing; its hello will come.
        if isinstance(message, Presence):
            if message.run in ("", self.run.run):
                self._take_presence(member, message)
        elif isinstance(message, Report):
            member.silent = False
            self._take_report(event.device, message)
        elif isinstance(message, BlobRequest):
            self._out.append(ServeBlob(event.device, message))
        elif isinstance(message, LogRequest) and message.first < self.replica.index:
            count = min(message.count, self.replica.index - message.first)
            self._out.append(ServeLog(event.device, LogRequest(message.first, count)))

    def _take_presence(self, member: Member, presence: Presence) -> None:
        """Note it; a device that has ended is not waited for, nor asked again, after a restart."""
        ended = member.has_ended
        member.take_presence(presence)
        if self.head.phase == "done" and not ended and member.has_ended:
            self._record("phase", f"{_DONE} {member.weights_digest}".encode(), device=member.name)

    def _greet(self, device: str, hello: Hello) -> None:
        member = self.roster.get(device)
        if member is None:
            if self.roster.is_full:
                order = Order(self.run.run, "refuse", hello.session, detail="the run has all the devices it can take")
                self._out.append(Send(Channel.COMMAND, order, device))
                return
            member = self.roster.enrol(device, hello)
            self._record("enrolment", hello.encode(), device=device)
        member.take_hello(hello)
        self._welcome(member)

    def _welcome(self, member: Member) -> None:
        if self.roster.is_numbered:
            order = Order(self.run.run, "welcome", member.session, member.ordinal)
        else:
            order = Order(self.run.run, "enrol", member.session)
        self._out.append(Send(Channel.COMMAND, order, member.name))

    def _take_report(self, device: str, report: Report) -> None:
        if self._round is None or report.round != self.head.round:
            verdict = Verdict.LATE
        elif device in self._round.reports:
            verdict = Verdict.DUPLICATE
        else:
            try:
                self._round.check(device, report, self.manifest, self._settings, self.replica.digest)
                self._record("report", report.encode(), device=device)
                self._round.reports[device] = report
                verdict = Verdict.ACCEPTED
            except ProtocolError as error:
                self._record("refusal", error.message.encode(), device=device)
                self.roster.members[device].refused_round = report.round
                verdict = Verdict.REFUSED
        self._out.append(Send(Channel.ACK, Receipt(report.round, verdict), device))

    # --- rounds ---------------------------------------------------------------------------------------------------

    def _move(self, now: float) -> None:
        """Close the round if it can be closed, open the next one if it can be opened."""
        if self._round is not None:
            self._close_if_due(self._round, now)
        while self._round is None and not self.finished:
            phase = self._next_phase()
            if phase == "done":
                self._end(now)
                return
            if not self._gathered(now):
                return
            if not self.roster.is_numbered:
                self.roster.number()
                for member in self.roster.members.values():
                    self._welcome(member)
            self._close_if_due(self._open(phase, now), now)

    def _next_phase(self) -> Phase:
        settings, length = self._settings, self.replica.index
        if settings.sparsity > 0 and self._scored < settings.saliency.steps:
            return "saliency"
        every = settings.evaluate_every
        due = length == settings.training.rounds or (every > 0 and length > 0 and length % every == 0)
        if due and self._evaluated_at != length:
            return "evaluate"
        return "train" if length < settings.training.rounds else "done"

    def _gathered(self, now: float) -> bool:
        """Whether enough devices are ready: all at the start, a quorum in between or when the time is over."""
        assert self._gather_until is not None
        ready = len(self.roster.ready())
        over = now >= self._gather_until
        if ready >= (self._settings.quorum if over else self._gather_target):
            return True
        if over:
            self._stop(
                QuorumError(
                    f"{ready} devices are ready, the quorum is {self._settings.quorum}",
                    hint="start more devices and resume the run, or lower --quorum",
                )
            )
        return False

    def _announce(self, phase: Phase) -> None:
        members = self.roster.ready()
        training, size = self.run.training, len(members)
        k = 0
        if phase == "train":
            slots = size if training.assignment == "dealt" else 1
            k = max(1, min(training.k, min(self.replica.directions.n_positions, MAX_SCALARS) // slots))
        has_log = phase != "saliency"
        self.head = Announcement(
            run=self.run.run,
            round=self.head.round + 1,
            phase=phase,
            participants=pack_participants(np.array([member.ordinal for member in members], dtype=np.int64)),
            k=k,
            cursor=self._cursor if phase == "train" else 0,
            mask_sha256=self._mask_sha256,
            mask_size=self._mask_size,
            log_length=self.replica.index,
            log_head=self.replica.head.hex() if has_log else "",
            weights_digest=self.replica.digest.hex() if has_log else "",
            deadline_s=self._settings.deadline_s,
        )
        self._record("announce", self.head.encode())
        self._out.append(Send(Channel.HEAD, self.head))

    def _open(self, phase: Phase, now: float) -> OpenRound:
        self._announce(phase)
        self._round = OpenRound(self.head, self.roster, deadline=now + self._settings.deadline_s)
        self._gather_until, self._gather_target = None, self._settings.quorum
        self._ask_server_to_evaluate()
        return self._round

    def _ask_server_to_evaluate(self) -> None:
        if self._round and self.head.phase == "evaluate" and self._has_test_set and not self._round.server_result:
            self._out.append(Evaluate(self.head.round, self.mask, self.replica.weights.copy()))

    def _close_if_due(self, current: OpenRound, now: float) -> None:
        assert current.deadline is not None
        usable, waiting, over = current.usable(), current.waiting(), now >= current.deadline
        if self.head.phase == "evaluate":
            counted = current.server_result is not None or not self._has_test_set
            if over or (counted and not waiting):
                self._close(current, usable, now)
        elif len(usable) >= self._settings.quorum and (over or not waiting):
            for name in waiting:
                self.roster.members[name].silent = True
            self._failures = 0
            self._close(current, usable, now)
        elif current.all_answered():
            self._stop(current.nobody_could(self._settings.quorum))
        elif over:
            self._miss_quorum(current, len(usable), waiting, now)

    def _miss_quorum(self, current: OpenRound, usable: int, waiting: list[str], now: float) -> None:
        self._failures += 1
        quorum = self._settings.quorum
        if self._failures >= self._settings.patience:
            message = (
                f"round {self.head.round}: {usable} reports after {self._failures} deadlines, the quorum is {quorum}"
            )
            self._stop(QuorumError(message, hint="start more devices and resume the run, or lower --quorum"))
            return
        current.deadline = now + self._settings.deadline_s
        for name in waiting:
            self.roster.members[name].silent = True
        if len(self.roster.ready()) >= quorum:
            self._open(self.head.phase, now)

    def _close(self, current: OpenRound, usable: list[str], now: float) -> None:
        if self.head.phase == "saliency":
            self._choose_mask([current.reports[name] for name in usable])
        elif self.head.phase == "train":
            self._update(current, usable)
        else:
            self._count(current, [current.reports[name] for name in usable])
        self._round = None
        self._gather_until = now + self._settings.deadline_s * self._settings.patience

    def _choose_mask(self, reports: list[Report]) -> None:
        blocks = [block.astype(np.float32) for block in average_blocks(reports)]
        dense = np.zeros(self.manifest.layout.size, dtype=np.float32)
        dense[self.mask.kept] = self.replica.weights
        scores = diagonal_scores(self.manifest, dense, blocks[0], blocks[1], blocks[2] if len(blocks) > 2 else None)
        part = (self._scored + 1) / self._settings.saliency.steps
        sparsity = 1.0 - (1.0 - self._settings.sparsity) ** part
        encoded = threshold(self.manifest.layout, scores, sparsity, within=self.mask).encode()
        self._record("mask", encoded)
        self._adopt_mask(encoded)

    def _adopt_mask(self, encoded: bytes) -> None:
        self._set_mask(Mask.decode(encoded, self.manifest.layout), encoded)
        self._scored += 1
        self._out.append(OfferBlob(bytes.fromhex(self._mask_sha256), encoded))

    def _update(self, current: OpenRound, usable: list[str]) -> None:
        training, index = self.run.training, self.replica.index
        slots = [(current.slot(name), current.reports[name]) for name in usable]
        segments, coefficients = combine_probes(training.assignment, self.head.cursor, self.head.k, slots)
        try:
            record = self.replica.prepare(index, self.head.round, training.rate(index), segments, coefficients)
        except ProtocolError as error:
            self._stop(FedzoError(f"training diverged: {error.message}", hint="lower --learning-rate"))
            return
        self._record("update", record.encode())
        self._advance_cursor()
        self._out.append(Send(Channel.LOG, record))

    def _advance_cursor(self) -> None:
        slots = len(self.roster.names_of(self.head.participants)) if self.run.training.assignment == "dealt" else 1
        self._cursor = self.head.cursor + slots * self.head.k

    def _count(self, current: OpenRound, reports: list[Report]) -> None:
        devices, server = evaluate_reports(reports), current.server_result
        result: dict[str, float | int | str | None] = {
            "log_length": self.replica.index,
            "weights_digest": self.replica.digest.hex(),
            "devices": len(reports),
            "loss": devices.mean_loss if devices else None,
            "accuracy": devices.accuracy if devices else None,
            "samples": devices.samples if devices else 0,
            "server_loss": server.mean_loss if server else None,
            "server_accuracy": server.accuracy if server else None,
            "server_samples": server.samples if server else 0,
        }
        self._record("evaluation", json.dumps(result, sort_keys=True).encode())
        self._adopt_evaluation(result)

    def _adopt_evaluation(self, result: dict[str, float | int | str | None]) -> None:
        self.evaluations.append(result)
        self._evaluated_at = self.replica.index

    def _end(self, now: float) -> None:
        """Announce the end, then wait until every live device holds the final weights."""
        if self.head.phase != "done":
            self._announce("done")
            self._gather_until = now + self._settings.deadline_s
        assert self._gather_until is not None
        if now >= self._gather_until or all(member.status == "done" for member in self.roster.alive()):
            self._record("phase", _DONE.encode())
            self._finish(None)

    def _adopt_end(self, device: str, payload: bytes) -> None:
        """What was only stopped goes on; what is done stays so."""
        word, _, digest = payload.decode().partition(" ")
        member = self.roster.get(device)
        if word == _DONE and member is not None:
            member.status, member.weights_digest = "done", digest
        elif word == _DONE:
            self.finished = True

    def _stop(self, error: FedzoError) -> None:
        self._record("phase", f"stopped: {error.message}".encode())
        self._finish(error)

    def _finish(self, error: FedzoError | None) -> None:
        self.finished = True
        self._out.append(Finish(error))

"""The server's half of the round, without I/O: ``on(event, now) -> commands``.

What the run does next is a function of what the journal holds (``journaled_run.py``), so a restart needs no state of
its own: :meth:`Coordinator.restore` reads the entries back and the run goes on where they end.

============  ==========================================  ====================================
phase         lasts until                                 then
============  ==========================================  ====================================
``enrol``     enough devices are ready                    the first round
``saliency``  scores of a quorum                          a mask; after the last step, training
``train``     scalars of a quorum                         an update; every so often, evaluation
``evaluate``  devices and server have counted             training, or the end
``done``      every live device has the final weights     leave
============  ==========================================  ====================================
"""

from __future__ import annotations

import json

from ..artifact.manifest import Manifest
from ..errors import FedzoError, QuorumError
from ..repeater import Repeater
from ..wire.documents import Hello, Phase, Presence, RunDocument, ServerPresence, one_line
from ..wire.messages import Receipt, Report, Verdict
from ..wire.topics import Channel
from ..wire.transfers import BlobRequest, LogRequest
from .coordinator_events import (
    Connected,
    CoordinatorCommand,
    CoordinatorEvent,
    DeviceSaid,
    Finish,
    Garbled,
    MakeMask,
    MaskMade,
    ScoresChecked,
    Send,
    ServeBlob,
    ServerEvaluated,
)
from .journaled_run import DONE, JournaledRun
from .open_round import OpenRound
from .roster import REPLACED, Member, introduction, refusal

__all__ = ["Coordinator"]

REPUBLISH_S = 30.0
SKIPPED_ROUNDS = 1 << 20
"""How far a server goes beyond its journal's last round when devices know of later ones."""


class Coordinator(JournaledRun):
    """One run of one federation.

    Args:
        run: Run id, artifact and settings.
        manifest: The artifact.
        birth: Grows with every start of the server.
        has_test_set: Whether :class:`Evaluate` will be answered.

    Attributes:
        head: What is announced now.
        roster: The devices.
        finished: Whether :class:`Finish` was given.
        leaving: Set by a server that stops: reports are still recorded, nothing is closed, opened or announced.
    """

    def __init__(self, run: RunDocument, manifest: Manifest, *, birth: int, has_test_set: bool = False) -> None:
        super().__init__(run, manifest)
        self.leaving = False
        self._presence = ServerPresence(True, birth)
        self._has_test_set = has_test_set
        self._failures = 0
        self._least_round = 0
        self._again = Repeater(REPUBLISH_S)

    # --- events ---------------------------------------------------------------------------------------------------

    @property
    def wakeup(self) -> float | None:
        """When the next ``Tick`` is due, if nothing else happens before."""
        is_idle = self.finished or self._progress.awaits_mask
        return None if is_idle else self._round.deadline if self._round else self._gathering.until

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
        if self._round is None and self._gathering.until is None:
            over = self.head.phase == "done"
            self._gathering.until = now + (self._settings.deadline_s if over else self._settings.enrol_deadline_s)
        if self._round is not None and self._round.deadline is None:
            self._round.deadline = now + self._settings.deadline_s
        if isinstance(event, Connected):
            self._out.append(Send(Channel.SERVER, self._presence))
            self._publish()
            self._ask_server()
        elif isinstance(event, DeviceSaid):
            self._hear(event, now)
        elif isinstance(event, Garbled):
            self._note_garbled(event)
        elif isinstance(event, MaskMade) and self._progress.awaits_mask:
            self._decide_mask(event.encoded)
        elif isinstance(event, ScoresChecked) and self._round and event.round == self.head.round:
            if (reason := self._round.judge(event.device, event.difference)) is not None:
                self._record("refusal", reason.encode(), device=event.device)
        elif isinstance(event, ServerEvaluated) and self._round and event.round == self.head.round:
            self._round.server_result = event
        self._move(now)
        return self._out

    def _publish(self) -> None:
        self._out += [Send(Channel.RUN, self.run), Send(Channel.HEAD, self.head)]

    def _note_garbled(self, event: Garbled) -> None:
        member = self.roster.get(event.device)
        if member is not None and member.garbled_round < self.head.round:  # Once a round, as with refusals.
            member.garbled_round = self.head.round
            self._record("garbled", one_line(event.reason).encode(), device=event.device)

    def _hear(self, event: DeviceSaid, now: float) -> None:
        message, member = event.message, self.roster.get(event.device)
        if isinstance(message, Hello):
            if member is not None and member.session == message.session and self._again.is_due(now):
                self._publish()  # It repeats itself, so it may lack what the broker should have kept.
            self._greet(event.device, message)
            return
        if isinstance(message, Presence) and message.run == self.run.run:
            if self._is_behind(event.device, message):
                self._skip_rounds(now)
            if member is None and message.status == "ready":  # Its hello was heard by a later journal.
                order = introduction(self.run.run, message.session)
                self._out.append(Send(Channel.COMMAND, order, event.device))
        if member is None:
            return  # A stranger's report means nothing; its hello will come.
        if isinstance(message, Presence):
            if message.run in ("", self.run.run):
                self._take_presence(member, message)
            return
        member.silent = False
        if isinstance(message, Report):
            self._take_report(member, message)
        elif isinstance(message, BlobRequest):
            self._out.append(ServeBlob(event.device, message))
        elif isinstance(message, LogRequest):
            self._out += self._catch_up.answer(event.device, message, self.replica, self.head.round)

    def _is_behind(self, device: str, presence: Presence) -> bool:
        """Whether a device knows of more than the journal: later rounds, later updates, or its report of this round."""
        if presence.round > self.head.round + 1 or presence.log_length > self.replica.index:
            return True
        return presence.round > self.head.round and self._round is not None and self._round.lacks(device)

    def _skip_rounds(self, now: float) -> None:
        """Rounds after the journal's last one were announced before: it is an older copy, or was begun again.

        Devices listen to announcements with larger numbers only, so the next one gets a number beyond all those, and
        they start over from this log. Once a start, since a device may say anything.
        """
        beyond = self.head.round + SKIPPED_ROUNDS
        if self._least_round or self.head.phase == "done" or beyond >= 1 << 32:
            return
        self._least_round = beyond
        if self._round is not None:
            self._record_close(self._round, "skipped", now)
            self._gather(now)

    def _take_presence(self, member: Member, presence: Presence) -> None:
        """Note it; a device that has ended is not waited for, nor asked again, after a restart.

        One that does not keep to its limit may have lost the order.
        """
        ended = member.has_ended
        member.take_presence(presence)
        if presence.session < member.session and presence.status in ("joining", "ready"):
            order = refusal(self.run.run, presence.session, REPLACED)
            self._out.append(Send(Channel.COMMAND, order, member.name))
        elif presence.status in ("joining", "ready"):
            self._lower(member)
        if self.head.phase == "done" and not ended and member.has_ended:
            self._record("phase", f"{DONE} {member.weights_digest}".encode(), device=member.name)

    def _greet(self, device: str, hello: Hello) -> None:
        order, is_new = self.roster.greet(self.run.run, device, hello)
        if is_new:
            self._record("enrolment", hello.encode(), device=device)
        self._out.append(Send(Channel.COMMAND, order, device))

    def _lower(self, member: Member) -> None:
        if member.is_over_limit:
            self._out.append(Send(Channel.COMMAND, member.welcome(self.run.run), member.name))

    def _take_report(self, member: Member, report: Report) -> None:
        verdict, reason = Verdict.LATE, ""
        if report.run_tag != self.run.tag:
            pass
        elif self._round is not None and report.round == self.head.round:
            digest = self._progress.digest_for(self.head.phase)
            verdict, reason = self._round.take(member.name, report, self.manifest, digest)
        else:
            verdict, reason = self._late.take(member, report)
        if verdict is Verdict.ACCEPTED:
            self._record("report", report.encode(), round_=report.round, device=member.name)
            if self._round is not None and self._round.has_new_scores:  # An evaluation takes a copy of the weights.
                self._ask_server()
        elif verdict is Verdict.REFUSED and member.refused_round < report.round:
            # Once a round: a device must not fill the disk.
            self._record("refusal", reason.encode(), round_=report.round, device=member.name)
            member.refused_round = report.round
        self._out.append(Send(Channel.ACK, Receipt(report.run_tag, report.round, verdict), member.name))
        self._lower(member)

    # --- rounds ---------------------------------------------------------------------------------------------------

    def _move(self, now: float) -> None:
        """Close the round if it can be closed, open the next one if it can be opened."""
        if self.leaving:
            return
        if self._round is not None:
            self._close_if_due(self._round, now)
        while self._round is None and not self.finished and not self._progress.awaits_mask:
            if (encoded := self._progress.own_mask()) is not None:
                self._decide_mask(encoded)
            phase = self._progress.next_phase()
            if phase == "done":
                self._end(now)
                return
            try:
                if not self._gathering.is_complete(now):
                    return
            except QuorumError as error:
                self._stop(error)
                return
            self._close_if_due(self._open(phase, now), now)

    def _announce(self, phase: Phase) -> None:
        newly_numbered = not self.roster.is_numbered
        self.roster.number()
        members = self.roster.ready() if phase != "done" else self.roster.finalists(self.head.participants)
        self.head = self._progress.announce(phase, max(self.head.round + 1, self._least_round), members)
        self._record("announce", self.head.encode())
        if newly_numbered:
            for member in self.roster.members.values():
                self._out.append(Send(Channel.COMMAND, member.welcome(self.run.run), member.name))
        self._out.append(Send(Channel.HEAD, self.head))

    def _open(self, phase: Phase, now: float) -> OpenRound:
        self._announce(phase)
        self._round = self._round_of(self.head)
        self._round.deadline = now + self._settings.deadline_s
        self._gathering.until = None
        self._gathering.expect_quorum()
        self._ask_server()
        return self._round

    def _ask_server(self) -> None:
        if self._round and self.head.phase != "train":  # of which there are none, and the weights would be copied
            self._out += self._round.questions(self.mask, self.replica.evaluated()[0], self._has_test_set)
        elif self._progress.awaits_mask:
            self._out.append(MakeMask())

    def _close_if_due(self, current: OpenRound, now: float) -> None:
        ending = current.ending(now, self._has_test_set)
        if ending == "close":
            self._close(current, now)
        elif ending == "lowered" or (ending in ("others", "short") and self._has_patience()):
            self._record_close(current, ending, now)
            self._gather(now)
            if ending == "short":
                self._gathering.expect_one_more(now)
        elif ending in ("others", "short", "nobody"):
            self._stop(current.nobody_could(self._settings.quorum), is_diverged=current.is_diverged())
        elif ending == "missed":
            self._miss_quorum(current, now)

    def _has_patience(self) -> bool:
        self._failures += 1
        return self._failures < self._settings.patience

    def _miss_quorum(self, current: OpenRound, now: float) -> None:
        if not self._has_patience():
            self._stop(current.too_few(self._settings.quorum, self._failures))
            return
        current.silence()
        if self.roster.count_ready() >= self._settings.quorum:
            self._record_close(current, "missed", now)
            self._open(self.head.phase, now)
        else:
            current.is_overdue = False
            self._out.append(Send(Channel.HEAD, self.head))  # Those that are there have perhaps never got it.

    def _close(self, current: OpenRound, now: float) -> None:
        current.silence()
        self._failures = 0
        self._record_close(current, "close", now)
        if self.head.phase == "saliency":
            self._decide_mask(self._progress.choose_mask([report for _, report in current.usable()]))
        elif self.head.phase == "train":
            self._update(current)
        else:
            result = self._progress.count([report for _, report in current.usable()], current.server_result)
            payload = json.dumps(result, sort_keys=True).encode()
            self._record("evaluation", payload)
            self._adopt("evaluation", payload)
        self._gather(now)

    def _gather(self, now: float) -> None:
        self._round = None
        self._gathering.until = now + self._settings.deadline_s * self._settings.patience

    def _update(self, current: OpenRound) -> None:
        try:
            late = self._late.groups(self.replica.index)
            record = self._progress.make_update(self.head, current.ranked(), late)
        except FedzoError as error:
            self._stop(error, is_diverged=True)
            return
        self._late.close(current)
        self._record("update", record.encode())
        self._out.append(Send(Channel.LOG, record))
        self._record_snapshot_if_due()

    def _end(self, now: float) -> None:
        """Announce the end, then wait until every device that is there, or just was, holds the final weights.

        Nobody leaves after a range test: another run follows, with the rate that was found.
        """
        if self.range_test is None and self.head.phase != "done":
            self._announce("done")
            self._gathering.until = now + self._settings.deadline_s
        until = self._gathering.until
        if self.range_test is not None or until is None or now >= until or self.roster.is_done(self.head.participants):
            self._record("phase", DONE.encode())
            self._finish(None)

    def _stop(self, error: FedzoError, *, is_diverged: bool = False) -> None:
        if is_diverged and self.range_test is not None:
            self._end(0.0)  # It went as far as it can.
            return
        self._record("phase", f"stopped: {error.message}".encode())
        self._finish(error)

    def _finish(self, error: FedzoError | None) -> None:
        self.finished = True
        self._out.append(Finish(error))

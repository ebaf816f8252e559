"""A run as its journal has it: what is recorded, and what the entries make of a new coordinator.

What the run does next is a function of this state, so a restart needs no other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from ..artifact.manifest import Manifest
from ..errors import ProtocolError
from ..wire.codec import decode
from ..wire.documents import Announcement, Hello, RunDocument, parse
from ..wire.messages import KINDS, Report, UpdateRecord
from .catch_up import CatchUp
from .closings import Closing
from .coordinator_events import CoordinatorCommand, OfferBlob, Record, RecordKind
from .gathering import Gathering
from .open_round import Ending, OpenRound
from .roster import Roster
from .run_progress import RunProgress
from .run_view import RunView
from .snapshots import Snapshot, SnapshotClock
from .staleness import LateReports

__all__ = ["DONE", "JournaledRun"]

DONE = "done"


class JournaledRun(RunView):
    """The state of a run, and its journal.

    Args:
        run: Run id, artifact and settings.
        manifest: The artifact.

    Attributes:
        run: As given.
        manifest: As given.
        head: What is announced now.
        roster: The devices.
        finished: Whether the run is over.
    """

    def __init__(self, run: RunDocument, manifest: Manifest) -> None:
        super().__init__(RunProgress(run, manifest))
        self.run = run
        self.manifest = manifest
        self.roster = Roster()
        self.finished = False
        self.head = Announcement(run.run, 0, "enrol")
        self._settings = run.settings
        self._round: OpenRound | None = None
        self._gathering = Gathering(self.roster, self._settings)
        self._late = LateReports(self._settings, manifest)
        self._out: list[CoordinatorCommand] = []
        self._recorded_run, self._recorded_close = False, -1
        self._clock = SnapshotClock()
        self._catch_up = CatchUp(self._settings.snapshots)

    def restore(self, entries: Iterable[tuple[RecordKind, int, str, bytes]]) -> list[CoordinatorCommand]:
        """Read the journal back, in order, before the first event.

        Args:
            entries: ``(kind, round, device, payload)`` as they were recorded. In front of a snapshot it is enough to
                have the run, the enrolments, the evaluations and the last mask.

        Returns:
            Blobs to offer again.

        Raises:
            ProtocolError: The journal belongs to another run, or replaying it gives other weights.
        """
        self._out = []
        for kind, round_, device, payload in entries:
            self._clock.count(kind, payload)
            self._catch_up.count(kind, payload)
            if kind == "run":
                if parse(RunDocument, payload) != self.run:
                    raise ProtocolError("the journal belongs to a run with other settings or another artifact")
                self._recorded_run = True
            elif kind == "enrolment":
                self.roster.enrol(device, parse(Hello, payload))
            elif kind == "announce":
                self.head = parse(Announcement, payload)
                self.roster.number()
                self._round = self._round_of(self.head) if self.head.phase in KINDS else None
                self._gathering.expect_quorum()
            elif kind == "report":
                message = decode(payload)
                if isinstance(message, Report) and self._round and round_ == self.head.round:
                    self._round.accept(device, message)
                elif isinstance(message, Report):
                    self._late.accept(self.roster.members[device], message)
            elif kind == "refusal" and device in self.roster.members:
                self.roster.members[device].refused_round = round_
                if self._round and round_ == self.head.round:
                    self._round.drop(device)
            elif kind == "garbled" and device in self.roster.members:
                self.roster.members[device].garbled_round = round_
            elif kind == "close":
                self._recorded_close = round_
            elif kind == "phase":
                self._adopt_end(device, payload)
            elif kind in ("mask", "update", "evaluation"):
                self._adopt(kind, payload)
                self._round = None
            elif kind == "snapshot":
                self._adopt_snapshot(Snapshot.decode(payload))
        return self._out

    # --- writing --------------------------------------------------------------------------------------------------

    def _record(self, kind: RecordKind, payload: bytes, *, round_: int | None = None, device: str = "") -> None:
        self._clock.count(kind, payload)
        self._catch_up.count(kind, payload)
        self._out.append(Record(kind, self.head.round if round_ is None else round_, device, payload))

    def _record_close(self, current: OpenRound, ending: Ending, now: float) -> None:
        if self._recorded_close != self.head.round:  # Else it closes again, what followed was not recorded any more.
            self._recorded_close = self.head.round
            self._record("close", Closing.of(current, ending, now).encode())

    def _record_snapshot_if_due(self) -> None:
        """To be called right after an update, when nothing of the round matters any more."""
        if self._clock.is_due(self.replica.snapshot_bytes + self.roster.state_bytes, self.replica.weights.size):
            state = {
                "head": self.head.encode().hex(),
                "roster": self.roster.state(),
                "progress": self._progress.state(),
                "late": self._late.state(),
            }
            snapshot = Snapshot(state, self._progress.state_arrays(), self.replica.snapshot())
            self._record("snapshot", snapshot.encode())

    def _decide_mask(self, encoded: bytes) -> None:
        self._record("mask", encoded)
        self._adopt("mask", encoded)

    # --- reading --------------------------------------------------------------------------------------------------

    def _round_of(self, head: Announcement) -> OpenRound:
        return OpenRound(head, self.roster, self._settings, self._progress.deals(head), self._late)

    def _adopt(self, kind: RecordKind, payload: bytes) -> None:
        if kind == "mask":
            self._progress.adopt_mask(payload)
            self._out.append(OfferBlob(bytes.fromhex(self._progress.mask_sha256), payload))
        elif kind == "update":
            record = decode(payload)
            assert isinstance(record, UpdateRecord)
            self._progress.adopt_update(record, self.head, self._round.ranked() if self._round else [])
            if self._round:
                self._late.close(self._round)
        else:
            self._progress.adopt_evaluation(json.loads(payload))

    def _adopt_snapshot(self, snapshot: Snapshot) -> None:
        """Go on from it; where everything before it was replayed, check it instead."""
        if self.replica.index > 0:
            if self.replica.snapshot() != snapshot.replica:
                raise ProtocolError(f"the snapshot after update {self.replica.index - 1} has other weights or moments")
            return
        try:
            self.head = parse(Announcement, bytes.fromhex(snapshot.state["head"]))
            self.roster.restore(snapshot.state["roster"])
            self._progress.restore(snapshot.state["progress"], snapshot.arrays, snapshot.replica)
            self._late.restore(snapshot.state["late"], self._round_of)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"the snapshot does not fit the run: {error}") from None
        self._round = None
        self._gathering.expect_quorum()

    def _adopt_end(self, device: str, payload: bytes) -> None:
        """What is done stays so; what was only stopped goes on, in a new round if too few could compute in the last."""
        word, _, digest = payload.decode().partition(" ")
        member = self.roster.get(device)
        if word == DONE and member is not None:
            member.status, member.weights_digest = "done", digest
        elif word == DONE:
            self.finished = True
        elif self._round and self._round.all_answered() and self._round.n_counted < self._settings.quorum:
            self._round = None
            self._gathering.expect_all()
            self.roster.forget_presence()

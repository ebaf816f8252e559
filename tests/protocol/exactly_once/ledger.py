"""What a journal says, read a second time and more simply than the machines do: who counted where, and how often."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from fedzo.protocol.artifact.manifest import Manifest
from fedzo.protocol.perturbation.dealing import deals_of
from fedzo.protocol.server_side.coordinator_events import RecordKind
from fedzo.protocol.server_side.run_progress import RunProgress
from fedzo.protocol.server_side.staleness import Group, combine_groups
from fedzo.protocol.settings import RunSettings
from fedzo.protocol.wire.codec import decode
from fedzo.protocol.wire.documents import Announcement, RunDocument, parse
from fedzo.protocol.wire.messages import Report, UpdateRecord
from fedzo.protocol.wire.participants import unpack_participants

__all__ = ["Ledger", "PlainEntry", "read_report", "read_update"]

PlainEntry = tuple[RecordKind, int, str, bytes]
Key = tuple[int, str]


@functools.lru_cache(maxsize=4096)
def read_report(payload: bytes) -> Report:
    """A recorded report."""
    report = decode(payload)
    assert isinstance(report, Report)
    return report


@functools.lru_cache(maxsize=4096)
def read_update(payload: bytes) -> UpdateRecord:
    """A recorded update."""
    record = decode(payload)
    assert isinstance(record, UpdateRecord)
    return record


@functools.lru_cache(maxsize=4096)
def read_announcement(payload: bytes) -> Announcement:
    """A recorded announcement."""
    return parse(Announcement, payload)


@dataclass
class Ledger:
    """Reads entries in order, and fails at the first that must not be there.

    Attributes:
        run: The run.
        manifest: Its artifact.
        counted: Index of the update that a report is behind, by round and device; -1 for a mask.
    """

    run: RunDocument
    manifest: Manifest
    counted: dict[Key, int] = field(default_factory=dict)
    _progress: RunProgress = field(init=False)
    _heads: dict[int, Announcement] = field(default_factory=dict)
    _ordinals: dict[str, int] = field(default_factory=dict)
    _enrolled: list[str] = field(default_factory=list)
    _latest: Announcement | None = None
    _is_open: bool = False
    _waiting: dict[Key, Report] = field(default_factory=dict)
    _updates: list[int] = field(default_factory=list)
    _reported: set[Key] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._progress = RunProgress(self.run, self.manifest)

    @property
    def settings(self) -> RunSettings:
        """Of the run."""
        return self.run.settings

    def read(self, entry: PlainEntry) -> None:
        """Take one entry."""
        kind, round_, device, payload = entry
        if kind == "enrolment":
            assert device not in self._enrolled, f"{device} was enrolled twice"
            self._enrolled.append(device)
            if self._latest is not None:
                self._ordinals[device] = len(self._ordinals)
        elif kind == "announce":
            self._announced(round_, read_announcement(payload))
        elif kind == "report":
            self._report(round_, device, read_report(payload))
        elif kind == "refusal":
            self._waiting.pop((round_, device), None)
        elif kind in ("mask", "update", "evaluation"):
            self._decided(kind, round_, payload)

    def _announced(self, round_: int, head: Announcement) -> None:
        if self._latest is None:
            self._ordinals = {name: ordinal for ordinal, name in enumerate(sorted(self._enrolled))}
        assert head.round == round_ > (self._latest.round if self._latest else -1), "round numbers do not grow"
        self._forget_open()
        self._latest, self._is_open = head, head.phase not in ("done", "enrol")
        self._heads[round_] = head

    def _forget_open(self) -> None:
        """A round that was given up for another one: its reports count nowhere."""
        if self._is_open and self._latest is not None:
            self._waiting = {key: report for key, report in self._waiting.items() if key[0] != self._latest.round}

    def _report(self, round_: int, device: str, report: Report) -> None:
        assert report.round == round_, f"a report on round {report.round} is recorded for round {round_}"
        assert (round_, device) not in self._reported, f"two reports of {device} on round {round_}"
        assert self._latest is not None
        self._reported.add((round_, device))
        if not (self._is_open and round_ == self._latest.round):
            # Late: its round has made an update, which is not too long ago, and another one follows.
            assert round_ in self._updates[-self.settings.staleness :] if self.settings.staleness else False
            assert len(self._updates) < self.settings.training.rounds
        assert device in self._members(round_), f"{device} is no participant of round {round_}"
        if report.blocks:
            self._waiting[round_, device] = report

    def _members(self, round_: int) -> dict[str, int]:
        """Participants of a round and their ranks."""
        ordinals = unpack_participants(self._heads[round_].participants).tolist()
        names = {ordinal: name for name, ordinal in self._ordinals.items()}
        return {names[ordinal]: rank for rank, ordinal in enumerate(ordinals)}

    def _decided(self, kind: str, round_: int, payload: bytes) -> None:
        head = self._latest
        if kind == "mask" and (head is None or head.phase != "saliency" or not self._is_open):
            self._progress.adopt_mask(payload)  # which the server made on its own
            return
        assert head is not None
        assert self._is_open, f"round {round_} was decided twice"
        assert round_ == head.round
        self._is_open = False
        if kind == "evaluation":
            self._waiting = {key: report for key, report in self._waiting.items() if key[0] != round_}
            return
        devices = {device for _, device in self._waiting}
        assert len(devices) >= self.settings.quorum, f"round {round_} was closed under the quorum"
        index = -1
        if kind == "update":
            index = read_update(payload).index
            self._check_update(read_update(payload), head)
            self._updates.append(round_)
        else:
            members = self._members(round_)
            scores = sorted(self._waiting.items(), key=lambda item: members[item[0][1]])
            mask = self._progress.choose_mask([report for _, report in scores])
            assert mask == payload, f"the mask of round {round_} is made of other scores"
            self._progress.adopt_mask(payload)
        for key in self._waiting:
            assert key not in self.counted, f"the report of {key[1]} on round {key[0]} counts twice"
            self.counted[key] = index
        self._waiting = {}

    def _check_update(self, record: UpdateRecord, head: Announcement) -> None:
        """It is what the reports that were waiting say: none is missing, none is there twice, no other is there."""
        assert (record.index, record.round) == (len(self._updates), head.round)
        groups = []
        for round_ in {round_ for round_, _ in self._waiting}:
            members = self._members(round_)
            mine = [(members[device], report) for (one, device), report in self._waiting.items() if one == round_]
            age = 0 if round_ == head.round else len(self._updates) - self._updates.index(round_)
            deals = deals_of(self.settings, self._progress.replica.blocks, self._heads[round_])
            groups.append(Group(age, deals, tuple(mine)))
        power = self.settings.staleness_power
        segments, coefficients, ages = combine_groups(groups, self.settings.aggregation, power)
        assert record.segments == segments, f"update {record.index} has scalars of others than those who reported"
        assert record.ages == ages, f"update {record.index} takes scalars for those of other rounds"
        assert record.coefficients.tobytes() == coefficients.tobytes(), f"update {record.index} counts them otherwise"

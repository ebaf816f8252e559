"""How a run stands, out of its journal alone: also while another process writes it, and after a crash."""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ...protocol.errors import ConfigError
from ...protocol.wire.documents import Announcement, RunDocument, parse, unpack_participants
from ...protocol.wire.messages import Decline, ReportNumbers, report_numbers
from ..journal import Entry, SqliteJournal
from ..telemetry.refusal_reasons import refusal_reason
from .replay import run_document
from .run_folder import JOURNAL_NAME
from .summary import held_out_accuracy

if TYPE_CHECKING:
    from typing_extensions import Self  # typing.Self came with Python 3.11

__all__ = ["DeviceRow", "RunFollower", "RunStatus", "server_process"]

_RATE_ROUNDS = 20  # that the pace is taken of
_SMALL_KINDS = ("enrolment", "evaluation", "refusal", "phase")


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """What the journal says of one device.

    Attributes:
        name: Device id.
        state: ``reported``, ``waiting`` or ``refused`` in the open round, ``declined`` when it had no scalars, ``idle``
            when the round does not ask it, ``done`` at the end.
        round: Of its latest report in the last two rounds, or since the follower began; -1 without one.
        seen_s_ago: Seconds since that report.
        elapsed_ms: Time that it took.
        peak_rss_mib: Peak of its process.
        mean_loss: Loss that it saw.
        refused: Reports that were refused, one a round at most.
    """

    name: str
    state: str
    round: int
    seen_s_ago: float | None
    elapsed_ms: int
    peak_rss_mib: float
    mean_loss: float | None
    refused: int


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run at one moment.

    Attributes:
        run: Run id.
        folder: Its folder.
        phase: Of the announced round; ``stopped`` after an error that ended the server.
        reason: Of the stop.
        server_pid: Process that serves the run now; None if nobody does, or the system does not tell.
        round: Number of the announced round.
        updates: Updates made.
        updates_planned: Updates to make.
        devices: Enrolled devices.
        states: How many are in each state, see :class:`DeviceRow`.
        participants: Devices that the open round asks.
        answered: Of these, how many have reported.
        quorum: Reports that a round needs.
        reports: Accepted in the whole run.
        refused: Refused, counted once a device and round.
        refusals: These by reason.
        accuracy: Latest held-out accuracy.
        loss: Mean loss in the open round's reports, else in the one before.
        rounds_per_minute: Over the last rounds.
        reports_per_minute: Likewise.
        started_at: Unix time of the first entry.
        last_at: Of the newest entry.
        journal_bytes: Size of the journal's files.
        weights_digest: Of the weights at the announcement, hex.
        rows: Every device; those that need a look come first.
    """

    run: str
    folder: Path
    phase: str
    reason: str
    server_pid: int | None
    round: int
    updates: int
    updates_planned: int
    devices: int
    states: dict[str, int]
    participants: int
    answered: int
    quorum: int
    reports: int
    refused: int
    refusals: dict[str, int]
    accuracy: float | None
    loss: float | None
    rounds_per_minute: float | None
    reports_per_minute: float | None
    started_at: float
    last_at: float
    journal_bytes: int
    weights_digest: str
    rows: tuple[DeviceRow, ...]


@dataclass
class _Device:
    """What was read of a device so far."""

    report: ReportNumbers | None = None
    reported_at: float = 0.0
    refused: int = 0
    refused_round: int = -1
    is_done: bool = False


_ORDER = ("refused", "declined", "waiting", "reported", "idle", "done")


class RunFollower:
    """Reads a journal, then what is added to it. Nothing is written, and no weights are computed.

    Args:
        path: Folder of the run.

    Raises:
        ConfigError: It is no folder of a run.
        ArtifactError: The journal is empty or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path / JOURNAL_NAME
        if not self._file.is_file():
            hint = "see the folder that fedzo serve names (runs/... by default)"
            raise ConfigError(f"{path} is not the folder of a run: it has no {JOURNAL_NAME}", hint=hint)
        self._journal = SqliteJournal(self._file, read_only=True)
        try:
            self._begin()
        except BaseException:
            self._journal.close()
            raise

    def _begin(self) -> None:
        journal = self._journal
        self._run: RunDocument = run_document(journal, self._path)
        self._devices: dict[str, _Device] = {}
        self._numbered: list[str] | None = None
        self._head = Announcement(self._run.run, 0, "enrol")
        self._announced_at: deque[tuple[float, int]] = deque(maxlen=_RATE_ROUNDS + 1)
        self._refusals: Counter[str] = Counter()
        self._accuracy: float | None = None
        self._losses: dict[int, list[float]] = {}
        self._phase = self._reason = ""
        self._started_at = self._last_at = next(iter(journal.read()))[1].at
        self._reports = self._updates = self._last = 0
        announced = journal.sequences("announce")
        if len(announced) > 1:
            self._skip_to(announced[-2], announced)

    def _skip_to(self, recent: int, announced: list[int]) -> None:
        """Count what there may be millions of, read the little else, and let :meth:`poll` begin at the last round."""
        paced = announced[-_RATE_ROUNDS - 1 : -2]
        self._reports, *reports = self._journal.count_before("report", [recent, *paced])
        (self._updates,) = self._journal.count_before("update", [recent])
        for sequence, entry in self._journal.read(_SMALL_KINDS):
            if sequence >= recent:
                break
            if sequence > announced[0] and self._numbered is None:
                self._numbered = sorted(self._devices)
            self._take(entry)
        for sequence, count in zip(paced, reports, strict=True):
            self._announced_at.append((self._journal.get(sequence).at, count))
        self._numbered = sorted(self._devices) if self._numbered is None else self._numbered
        self._last = recent - 1

    def poll(self) -> RunStatus:
        """Read on, and say how the run stands.

        Raises:
            FedzoError: The journal cannot be read any more.
        """
        for sequence, entry in self._journal.read(from_sequence=self._last + 1):
            self._last = sequence
            self._take(entry)
        return self._status()

    def _take(self, entry: Entry) -> None:
        self._last_at = max(self._last_at, entry.at)
        device = self._devices.get(entry.device)
        if entry.kind == "enrolment" and device is None:
            self._devices[entry.device] = _Device()
            if self._numbered is not None:
                self._numbered.append(entry.device)
        elif entry.kind == "announce":
            self._announce(entry)
        elif entry.kind == "report":
            self._reports += 1
            self._report(entry, device)
        elif entry.kind == "refusal":
            self._refusals[refusal_reason(entry.payload.decode(errors="replace"))] += 1
            if device is not None:
                device.refused, device.refused_round = device.refused + 1, entry.round
        elif entry.kind == "update":
            self._updates += 1
        elif entry.kind == "evaluation":
            self._accuracy = held_out_accuracy(json.loads(entry.payload))
        elif entry.kind == "phase":
            self._end(entry, device)

    def _announce(self, entry: Entry) -> None:
        self._head = parse(Announcement, entry.payload)
        self._announced_at.append((entry.at, self._reports))
        self._phase = self._reason = ""
        self._losses = {number: found for number, found in self._losses.items() if number >= entry.round - 1}
        if self._numbered is None:
            self._numbered = sorted(self._devices)

    def _report(self, entry: Entry, device: _Device | None) -> None:
        if device is None:
            return
        report = report_numbers(entry.payload)
        device.report, device.reported_at = report, entry.at
        if report.decline is Decline.NONE:
            self._losses.setdefault(entry.round, []).append(report.mean_loss)

    def _end(self, entry: Entry, device: _Device | None) -> None:
        word, _, rest = entry.payload.decode(errors="replace").partition(" ")
        if word == "done" and device is not None:
            device.is_done = True
        elif word == "done":
            self._phase = "done"
        else:
            self._phase, self._reason = "stopped", rest

    def _status(self) -> RunStatus:
        now, head, numbered = time.time(), self._head, self._numbered or []
        asked = [numbered[int(i)] for i in unpack_participants(head.participants) if i < len(numbered)]
        is_open = head.phase in ("saliency", "train", "evaluate") and self._phase == ""
        participants = set(asked) if is_open else set()
        rows = [self._row(name, device, participants, now) for name, device in list(self._devices.items())]
        rows.sort(key=lambda row: (_ORDER.index(row.state), row.name))
        states = Counter(row.state for row in rows)
        losses = self._losses.get(head.round) or self._losses.get(head.round - 1) or []
        rounds, reports = self._pace()
        return RunStatus(
            run=self._run.run, folder=self._path, phase=self._phase or head.phase, reason=self._reason,
            server_pid=server_process(self._file), round=head.round, updates=self._updates,
            updates_planned=self._run.training.rounds, devices=len(rows), states=dict(states),
            participants=len(participants),
            answered=sum(row.state in ("reported", "declined") for row in rows if row.name in participants),
            quorum=self._run.settings.quorum, reports=self._reports, refused=sum(self._refusals.values()),
            refusals=dict(self._refusals.most_common()), accuracy=self._accuracy,
            loss=sum(losses) / len(losses) if losses else None, rounds_per_minute=rounds, reports_per_minute=reports,
            started_at=self._started_at, last_at=self._last_at, journal_bytes=_size(self._file),
            weights_digest=head.weights_digest, rows=tuple(rows),
        )  # fmt: skip

    def _row(self, name: str, device: _Device, participants: set[str], now: float) -> DeviceRow:
        report, state = device.report, "idle"
        if device.is_done or self._phase == "done":
            state = "done" if device.is_done else "idle"
        elif device.refused_round == self._head.round:
            state = "refused"
        elif name in participants:
            has_answered = report is not None and report.round == self._head.round
            state = "waiting"
            if has_answered and report is not None:
                state = "reported" if report.decline is Decline.NONE else "declined"
        if report is None:
            return DeviceRow(name, state, -1, None, 0, 0.0, None, device.refused)
        loss = report.mean_loss if report.decline is Decline.NONE else None
        peak = round(report.peak_rss_kib / 1024, 1)
        seen = max(0.0, now - device.reported_at)
        return DeviceRow(name, state, report.round, seen, report.elapsed_ms, peak, loss, device.refused)

    def _pace(self) -> tuple[float | None, float | None]:
        """Rounds and reports a minute, from announcement to announcement."""
        if len(self._announced_at) < 2:
            return None, None
        (start, before), (end, after) = self._announced_at[0], self._announced_at[-1]
        minutes = (end - start) / 60
        if minutes <= 0:
            return None, None
        return (len(self._announced_at) - 1) / minutes, (after - before) / minutes

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _size(file: Path) -> int:
    paths = (file, file.with_name(f"{file.name}-wal"))
    return sum(path.stat().st_size for path in paths if path.exists())


def server_process(journal: Path) -> int | None:
    """Process that holds the writer's lock of a journal, without touching the lock (proc(5), ``/proc/locks``)."""
    lock = journal.with_name(f"{journal.name}.lock")
    try:
        inode = lock.stat().st_ino
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            words = line.split()
            if "FLOCK" in words and "WRITE" in words and words[-3].rpartition(":")[2] == str(inode):
                owner = lock.read_text(encoding="ascii").strip()
                return int(owner) if owner.isdecimal() else int(words[words.index("WRITE") + 1])
    except (OSError, ValueError, IndexError):
        pass
    return None

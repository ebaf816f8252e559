"""A journal as a server leaves it after many rounds: the devices are made up, the decisions are not.

Every device of a round reports the same scalars. What follows from them (updates, weights, digests, snapshots) is what
the server's own code makes of them, so the journal replays, recounts and resumes like any other.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from fedzo.broker_server.history.recovery import keep_last_snapshot
from fedzo.broker_server.journal import Entry, Journal
from fedzo.protocol.artifact.manifest import Manifest
from fedzo.protocol.server_side.coordinator_events import Record
from fedzo.protocol.server_side.journaled_run import JournaledRun
from fedzo.protocol.wire.documents import Announcement, Hello, RunDocument
from fedzo.protocol.wire.messages import Report, ReportKind

__all__ = ["write_journal"]

SECONDS_A_ROUND = 5.0


class _Writer(JournaledRun):
    """A run that makes up its reports."""

    def __init__(self, run: RunDocument, manifest: Manifest, journal: Journal, names: Sequence[str]) -> None:
        super().__init__(run, manifest)
        self._journal = journal
        self._rng = np.random.default_rng(run.settings.seed)
        self._at = time.time()
        self._record("run", run.encode(), round_=0)
        for name in names:
            self._enrol(name)
        self.roster.number()
        for member in self.roster.members.values():
            member.status = "ready"
        while (encoded := self._progress.own_mask()) is not None:
            self._decide_mask(encoded)

    def _enrol(self, name: str) -> None:
        hello = Hello(1, "rpi-zero-2w", 160.0, 500, 50, "fedzo 0.1.0, onnxruntime 1.32.0", "aarch64")
        self.roster.enrol(name, hello)
        self._record("enrolment", hello.encode(), device=name)

    def flush(self) -> None:
        """Commit what was recorded."""
        records = [command for command in self._out if isinstance(command, Record)]
        self._out = []
        self._journal.append([Entry(r.kind, r.round, r.device, r.payload, self._at) for r in records])
        keep_last_snapshot(self._journal, {record.kind for record in records})
        self._at += SECONDS_A_ROUND

    def announce(self) -> Announcement:
        """The next round, which has to be one of training."""
        assert self._progress.next_phase() == "train"
        self.head = self._progress.announce("train", self.head.round + 1, self.roster.ready())
        self._record("announce", self.head.encode())
        self._round = self._round_of(self.head)
        self._round.deadline = self._at + self._settings.deadline_s
        return self.head

    def report(self, share: float = 1.0) -> None:
        """The first devices report on the open round."""
        head, current, training = self.head, self._round, self.run.training
        assert current is not None
        sizes = [deal.k for deal in self._progress.deals(head)]
        blocks = tuple(self._rng.standard_normal(size).astype(np.float32) for size in sizes)
        digest = self._progress.digest_for(head.phase)
        report = Report(
            ReportKind.PROBE, self.run.tag, head.round, 1, training.batch, digest, 2.0, sum(sizes), 900, 40_000, blocks,
            micro_batch=16,
        )  # fmt: skip
        payload = report.encode()
        names = current.participants
        for name in names[: round(share * len(names))]:
            current.accept(name, report)
            self._record("report", payload, device=name)

    def decide(self) -> None:
        """Close the round."""
        current = self._round
        assert current is not None
        self._record_close(current, "close", self._at)
        self._record("update", self._progress.make_update(self.head, current.ranked()).encode())
        self._record_snapshot_if_due()
        self._round = None


def write_journal(
    journal: Journal,
    run: RunDocument,
    manifest: Manifest,
    names: Sequence[str],
    rounds: int,
    *,
    open_share: float = 0.0,
) -> JournaledRun:
    """Write rounds of training; the settings have no evaluations between them, and a mask that needs no devices.

    Args:
        journal: Empty.
        run: The run's document.
        manifest: Its artifact.
        names: Ids of the devices; all of them take part in every round that does not draw some.
        rounds: Updates.
        open_share: If above 0, one more round is announced, and that share of its devices has reported.

    Returns:
        The state of the run after that.
    """
    writer = _Writer(run, manifest, journal, names)
    for _ in range(rounds):
        writer.announce()
        writer.report()
        writer.decide()
        writer.flush()
    if open_share > 0:
        writer.announce()
        writer.report(open_share)
        writer.flush()
    return writer

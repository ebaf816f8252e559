"""Reports that arrive together are committed together, and one that comes alone does not wait for long."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest

from fedzo.broker_server import group_commit
from fedzo.broker_server.group_commit import BATCH_EVENTS, BATCH_S, QUIET_S, gather
from fedzo.broker_server.journal import Entry, SqliteJournal


class Arrivals:
    """A queue with a clock of its own: when each event arrives, in seconds."""

    def __init__(self, *times: float) -> None:
        self.now = 0.0
        self.times = list(times)

    def monotonic(self) -> float:
        return self.now

    def get(self, timeout: float | None = None) -> float:
        assert timeout is not None
        if not self.times or self.times[0] > self.now + timeout:
            self.now += timeout
            raise queue.Empty
        self.now = max(self.now, self.times[0])
        return self.times.pop(0)


@pytest.mark.parametrize(
    ("times", "first", "until"),
    [
        ([0.5], 1, 0.5 + QUIET_S),  # alone
        ([0.5] * 20, 20, 0.5 + QUIET_S),  # a broker's window
        ([0.5, 0.5 + 2 * QUIET_S], 1, 0.5 + QUIET_S),  # one after the other
        ([0.5 + 0.0005 * n for n in range(100)], 8, 0.5 + BATCH_S),  # a steady stream
        ([0.5] * (BATCH_EVENTS + 5), BATCH_EVENTS, 0.5),  # a flood
    ],
)
def test_what_is_one_batch(times: list[float], first: int, until: float, monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals = Arrivals(*times)
    monkeypatch.setattr(group_commit, "time", arrivals)
    assert abs(len(gather(arrivals, 2.0)) - first) <= (first == 8)  # sums of halves of milliseconds round
    assert arrivals.now == pytest.approx(until, abs=1e-9)


def test_nothing_is_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals = Arrivals(5.0)
    monkeypatch.setattr(group_commit, "time", arrivals)
    with pytest.raises(queue.Empty):
        gather(arrivals, 2.0)
    assert arrivals.now == 2.0


def test_a_batch_is_one_sync(tmp_path: Path) -> None:
    """Frames of the write-ahead log carry the size of the database where a transaction ends, else 0."""
    with SqliteJournal(tmp_path / "journal") as journal:
        journal.append([Entry("phase", 0, "", b"begin", 0.0)])
        log = tmp_path / "journal-wal"
        before = log.stat().st_size
        journal.append([Entry("report", 1, f"pi-{n}", bytes(500), 0.0) for n in range(1000)])
        frames = log.read_bytes()[before:]
        size = 24 + 4096
        commits = [frames[start + 4 : start + 8] for start in range(0, len(frames), size)]
        assert len(commits) > 100
        assert sum(pages != bytes(4) for pages in commits) == 1
        assert commits[-1] != bytes(4)

"""The outbox: one report, whole or absent, whatever happens to the process or the file."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fedzo.edge_runtime.storage.outbox import Outbox
from fedzo.protocol.wire.messages import Decline, Report, ReportKind


def report(round_: int = 7, scalars: int = 5) -> Report:
    blocks = (np.arange(scalars, dtype=np.float32),) if scalars else ()
    decline = Decline.NONE if scalars else Decline.NO_DATA
    return Report(ReportKind.PROBE, b"run1", round_, 3, 16, bytes(range(16)), 2.25, 6, 40, 70_000, blocks, decline)


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "outbox")


@pytest.mark.parametrize("scalars", [0, 1, 60_000])
def test_what_is_saved_is_loaded(outbox: Outbox, scalars: int) -> None:
    outbox.save("run-1", report(scalars=scalars))
    loaded = Outbox(outbox.path).load()
    assert loaded is not None
    assert loaded[0] == "run-1"
    assert loaded[1].encode() == report(scalars=scalars).encode()


def test_only_the_last_report_is_kept(outbox: Outbox) -> None:
    outbox.save("run-1", report(1))
    outbox.save("run-2", report(2))
    loaded = outbox.load()
    assert loaded is not None
    assert (loaded[0], loaded[1].round) == ("run-2", 2)
    assert [entry.name for entry in outbox.path.parent.iterdir()] == ["outbox"]


def test_drop_may_be_repeated(outbox: Outbox) -> None:
    outbox.save("run-1", report())
    outbox.drop()
    outbox.drop()
    assert outbox.load() is None
    assert list(outbox.path.parent.iterdir()) == [outbox.sent]
    outbox.save("run-1", report())
    outbox.drop(is_lost=True)
    outbox.drop(is_lost=True)
    assert outbox.load() is None


def test_every_cut_and_every_flipped_byte_is_noticed(outbox: Outbox, caplog: pytest.LogCaptureFixture) -> None:
    outbox.save("run-1", report())
    good = outbox.path.read_bytes()
    damaged = [good[:length] for length in range(len(good))]
    damaged += [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(len(good))]
    damaged += [good + b"\0", b"FZO1", b"\xff" * 300_000]
    for data in damaged:
        outbox.path.write_bytes(data)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert outbox.load() is None
        assert "set aside" in caplog.text
        assert not outbox.path.exists()
        assert outbox.path.with_name("outbox.damaged").read_bytes() == data
    outbox.save("run-1", report())
    assert outbox.load() is not None


def test_a_run_id_that_is_no_name_is_damage(outbox: Outbox) -> None:
    outbox.save("../../etc", report())
    assert outbox.load() is None


def test_a_failed_write_leaves_the_report_before(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox.save("run-1", report(1))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedzo.edge_runtime.storage.durable.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        outbox.save("run-1", report(2))
    monkeypatch.undo()
    loaded = outbox.load()
    assert loaded is not None
    assert loaded[1].round == 1
    assert [entry.name for entry in outbox.path.parent.iterdir()] == ["outbox"]


def test_an_unreadable_outbox_is_no_reason_to_stop(outbox: Outbox, caplog: pytest.LogCaptureFixture) -> None:
    outbox.path.mkdir()
    with caplog.at_level(logging.WARNING):
        assert outbox.load() is None
    assert "cannot be read" in caplog.text


def test_a_writer_that_is_killed_leaves_a_whole_report(outbox: Outbox) -> None:
    script = (
        "import sys, pathlib, itertools\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from fedzo.edge_runtime.storage.outbox import Outbox\n"
        "from tests.edge_runtime.storage.test_outbox import report\n"
        "outbox = Outbox(pathlib.Path(sys.argv[1]))\n"
        "for round_ in itertools.count():\n"
        "    outbox.save('run-1', report(round_, 60_000 if round_ % 2 else 1))\n"
        "    print(round_, flush=True)\n"
    )
    root = Path(__file__).resolve().parents[3]
    saved = -1
    for _ in range(5):
        writer = subprocess.Popen(
            [sys.executable, "-c", script, str(outbox.path), str(root)], stdout=subprocess.PIPE, text=True, cwd=root
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(int.from_bytes(os.urandom(1), "little") / 2000)
        writer.send_signal(signal.SIGKILL)
        lines = writer.stdout.read().split()
        writer.stdout.close()
        writer.wait(10)
        saved = int(lines[-1]) if lines else 0
        loaded = outbox.load()
        assert loaded is not None
        # What was said to be saved is there; the one after it may be.
        assert loaded[1].round in (saved, saved + 1)

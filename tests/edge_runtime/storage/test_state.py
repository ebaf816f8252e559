"""The state folder: one device, one process, a counter that only grows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedzo.edge_runtime.storage.residual_file import Residual
from fedzo.edge_runtime.storage.state import DeviceState, default_folder, generate_id
from fedzo.protocol.errors import ConfigError
from fedzo.protocol.wire.messages import Report, ReportKind


def start(folder: Path | None, device: str | None = None) -> tuple[str, int]:
    with DeviceState(folder, federation="default", device=device) as state:
        return state.device, state.session


def test_the_id_is_made_once_and_kept(tmp_path: Path) -> None:
    first, session = start(tmp_path / "state")
    assert re.fullmatch(r"[a-z0-9-]{1,48}", first)
    again, later = start(tmp_path / "state")
    assert again == first
    assert later > session


def test_generated_ids_differ_and_are_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("Pi_Kitchen.local", "-", "", "ü" * 80, "x" * 200):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        ids = {generate_id() for _ in range(20)}
        assert len(ids) == 20
        assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]{1,47}", name) for name in ids)


def test_the_default_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    name, _ = start(None)
    assert start(None)[0] == name
    assert start(None, "other")[0] == "other"
    assert start(None)[0] == name
    assert (tmp_path / "fedzo" / "default" / "other" / "session").is_file()
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_folder("f") == Path("/home/somebody/.local/state/fedzo/f")


def test_a_folder_belongs_to_one_id(tmp_path: Path) -> None:
    start(tmp_path, "dev-a")
    with pytest.raises(ConfigError, match="belongs to the device dev-a"):
        start(tmp_path, "dev-b")
    assert start(tmp_path)[0] == "dev-a"


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from fedzo.edge_runtime.storage.state import DeviceState\n"
        "state = DeviceState(pathlib.Path(sys.argv[1]), federation='default', device=None)\n"
        "print(state.session, flush=True); sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None
    assert other.stdout is not None
    session = int(other.stdout.readline())
    with pytest.raises(ConfigError, match=rf"another fedzo-device \(process {other.pid}\) uses"):
        start(tmp_path)
    other.kill()  # The system frees the lock, whatever ended the process.
    other.wait(10)
    other.stdin.close()
    other.stdout.close()
    assert start(tmp_path)[1] > session


def test_the_session_grows_also_when_the_clock_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert [start(tmp_path)[1] for _ in range(3)] == [1, 2, 3]
    monkeypatch.setattr("time.time", lambda: 1000.7)
    assert [start(tmp_path)[1] for _ in range(2)] == [1000, 1001]
    monkeypatch.setattr("time.time", lambda: 5.0)
    assert start(tmp_path)[1] == 1002


@pytest.mark.parametrize("clock", [4_102_444_800.0, 2.0**32 + 5, 1e18])
def test_a_clock_that_cannot_be_does_not_use_the_counter_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: float
) -> None:
    monkeypatch.setattr("time.time", lambda: clock)
    assert [start(tmp_path)[1] for _ in range(2)] == [1, 2]
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert [start(tmp_path)[1] for _ in range(2)] == [2_000_000_000, 2_000_000_001]


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "4294967295", "9" * 100, "\x00", "٣"])
def test_a_damaged_counter_is_refused(tmp_path: Path, text: str) -> None:
    start(tmp_path, "dev-a")
    (tmp_path / "session").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="boot counter"):
        start(tmp_path)
    (tmp_path / "session").write_text("9\n")
    assert start(tmp_path)[1] > 9  # and the lock was freed


@pytest.mark.parametrize("device", ["", "Upper", "a/b", "x" * 49, "ä"])
def test_an_invalid_id_is_refused(tmp_path: Path, device: str) -> None:
    with pytest.raises(ConfigError, match="not a valid name"):
        start(tmp_path, device)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_id_is_refused(tmp_path: Path) -> None:
    (tmp_path / "id").write_bytes(b"\xff\x00/..")
    with pytest.raises(ConfigError, match="not a valid name"):
        start(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="state folder"):
        start(tmp_path / "state")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(ConfigError, match="state folder cannot be used"):
        start(tmp_path / "state")


def test_files_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    start(tmp_path)
    (tmp_path / "blobs").mkdir()
    for leftover in (tmp_path / ".partial-1", tmp_path / "blobs" / ".partial-2"):
        leftover.write_bytes(b"half")
    kept = tmp_path / "blobs" / "aa"
    kept.write_bytes(b"whole")
    start(tmp_path)
    assert [path.name for path in sorted(tmp_path.rglob("*")) if "partial" in path.name] == []
    assert kept.exists()


def test_a_residual_asks_the_outbox_of_its_folder(tmp_path: Path) -> None:
    key = bytes(32)
    with DeviceState(tmp_path / "b", federation="default", device="b") as state:
        state.residuals.save(Residual(key, 7, b"", bytes(4)))
        found = state.residuals.load(key, "run-1")
        assert found is not None
        assert found.is_lost
        state.residuals.save(Residual(key, 8, b"", bytes(4)))
        state.outbox.save(
            "run-1", Report(ReportKind.PROBE, b"run1", 8, 1, 1, bytes(16), 0.0, 1, 1, 1, (np.ones(1, np.float32),))
        )
        found = state.residuals.load(key, "run-1")
        assert found is not None
        assert not found.is_lost

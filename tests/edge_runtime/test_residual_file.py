"""residual_file: a state comes back for its run and mask, and for nothing else."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fedzo.edge_runtime.residual_file import ResidualFile


def test_a_state_comes_back_for_its_run_and_mask(tmp_path: Path) -> None:
    file = ResidualFile(tmp_path / "residual")
    assert file.load("run-1", "ab") == b""
    file.save("run-1", "ab", b"first")
    file.save("run-1", "ab", b"second")
    assert ResidualFile(tmp_path / "residual").load("run-1", "ab") == b"second"
    assert file.load("run-2", "ab") == file.load("run-1", "cd") == b""


@pytest.mark.parametrize("damage", [b"", b"FZR1", b"FZO1" + bytes(100), None])
def test_a_damaged_file_is_dropped(tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    file = ResidualFile(tmp_path / "residual")
    file.save("run-1", "ab", b"state")
    data = bytearray(file.path.read_bytes())
    data[-1] ^= 1
    file.path.write_bytes(bytes(data) if damage is None else damage)
    with caplog.at_level(logging.WARNING, logger="fedzo"):
        assert file.load("run-1", "ab") == b""
    assert "damaged" in caplog.text
    file.save("run-1", "ab", b"again")
    assert file.load("run-1", "ab") == b"again"


def test_a_file_that_cannot_be_written_or_read_is_only_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = ResidualFile(tmp_path / "folder" / "residual")
    with caplog.at_level(logging.WARNING, logger="fedzo"):
        file.save("run-1", "ab", b"state")
        (tmp_path / "taken").mkdir()
        assert ResidualFile(tmp_path / "taken").load("run-1", "ab") == b""
    assert "cannot be written" in caplog.text
    assert "cannot be read" in caplog.text

"""What stands beside the runs of one process."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedzo.cli.output import Output
from fedzo.cli.serve_operations import Operations


def test_the_service_manager_hears_of_two_runs_as_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A range test and the run that follows it."""
    heard: list[str] = []
    folder: Any = SimpleNamespace(path=tmp_path, journal_path=tmp_path / "journal.sqlite")
    server: Any = SimpleNamespace(state=None, coordinator=None)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(0)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

        def note(text: str) -> None:
            try:
                while True:
                    heard.append(manager.recv(100).decode())
            except BlockingIOError:
                heard.append(text)

        with ExitStack() as stack:
            operations = Operations(Output(), None, stack)
            stack.callback(note, "broker stops")
            for run in ("range test ends", "run ends"):
                with operations.serving(Output(), server, folder):
                    pass
                note(run)
    assert heard == ["READY=1", "range test ends", "run ends", "STOPPING=1", "broker stops"]

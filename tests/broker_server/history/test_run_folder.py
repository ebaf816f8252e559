"""The folder of a new run: whole or not there; one that has not begun does not stand in the way."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from fedzo.broker_server.history.replay import begin_run
from fedzo.broker_server.history.run_folder import RunFolder, has_begun
from fedzo.broker_server.journal import SqliteJournal
from fedzo.protocol.errors import ConfigError
from fedzo.protocol.settings import RunSettings
from tests.edge_runtime.conftest import write_artifact


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write_artifact(tmp_path / "artifact")
    return tmp_path / "artifact"


def create(artifact: Path) -> RunFolder:
    return RunFolder.create(artifact.parent / "runs", artifact, name="r1", place="{}")


def test_the_place_is_private(artifact: Path) -> None:
    folder = create(artifact)
    assert (folder.path / "serve.json").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in folder.path.parent.iterdir()] == ["r1"]


def test_a_start_that_fails_leaves_nothing(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", fail)
    with pytest.raises(ConfigError, match="No space left"):
        create(artifact)
    assert list((artifact.parent / "runs").iterdir()) == []


def test_what_a_killed_start_leaves_goes_with_the_next_start(artifact: Path) -> None:
    """Not that of a start that goes on beside it, nor what others put there."""
    script = (
        "import os, shutil, sys, time\n"
        "from pathlib import Path\n"
        "from fedzo.broker_server.history.run_folder import RunFolder\n"
        "def stop(source, target):\n"
        "    Path(target).mkdir()\n"
        "    print('copying', flush=True)\n"
        "    os.kill(os.getpid(), 9) if sys.argv[3] == 'kill' else time.sleep(600)\n"
        "shutil.copytree = stop\n"
        "RunFolder.create(Path(sys.argv[1]), Path(sys.argv[2]), name=sys.argv[3])\n"
    )
    runs = artifact.parent / "runs"
    (runs / ".notes.1.new").mkdir(parents=True)
    command = [sys.executable, "-c", script, str(runs), str(artifact)]
    assert subprocess.run([*command, "kill"], stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    with subprocess.Popen([*command, "other"], stdout=subprocess.PIPE) as lives:
        assert lives.stdout is not None
        try:
            assert lives.stdout.readline() == b"copying\n"
            create(artifact)
            assert sorted(path.name.split(".")[1] for path in runs.glob(".*")) == ["notes", "other"]
        finally:
            lives.kill()
    RunFolder.create(runs, artifact, name="r2")
    assert sorted(path.name for path in runs.iterdir()) == [".notes.1.new", "r1", "r2"]


def _no_journal(_: Path) -> None:
    pass


def _no_pages(path: Path) -> None:
    path.touch()


def _no_schema(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")


def _no_entry(path: Path) -> None:
    SqliteJournal(path).close()


@pytest.mark.parametrize("killed", [_no_journal, _no_pages, _no_schema, _no_entry])
def test_a_run_that_has_not_begun_is_made_again(artifact: Path, killed: object) -> None:
    folder = create(artifact)
    assert callable(killed)
    killed(folder.journal_path)
    (folder.artifact_path / "manifest.json").write_bytes(b"half")
    assert not has_begun(folder.path)
    again = create(artifact)
    assert again.artifact.digest == folder.artifact.digest
    with SqliteJournal(again.journal_path) as journal:
        begin_run(journal, again.document(RunSettings(devices=4)))
    assert has_begun(again.path)
    with pytest.raises(ConfigError, match="exists already"):
        create(artifact)


def test_a_folder_of_other_things_is_left_alone(artifact: Path) -> None:
    other = artifact.parent / "runs" / "r1"
    other.mkdir(parents=True)
    (other / "thesis.tex").write_text("dear")
    with pytest.raises(ConfigError, match="exists already"):
        create(artifact)
    assert (other / "thesis.tex").read_text() == "dear"


def test_a_run_that_another_process_begins(artifact: Path) -> None:
    folder = create(artifact)
    with SqliteJournal(folder.journal_path), pytest.raises(ConfigError, match="in use by process"):
        create(artifact)

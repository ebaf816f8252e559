"""The folder of a run: its journal and a copy of the artifact. Everything else is derived from these two."""

from __future__ import annotations

import errno
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from ...edge_runtime.storage.artifact import MANIFEST_NAME, Artifact, load_artifact
from ...protocol.artifact.manifest import Manifest
from ...protocol.errors import ArtifactError, ConfigError
from ...protocol.settings import RunSettings
from ...protocol.wire.documents import RunDocument
from ...protocol.wire.topics import check_name
from ..brokers.private_files import PrivateFolder
from ..journal import SqliteJournal

__all__ = ["PLACE_NAME", "RunFolder", "default_name", "has_begun"]

JOURNAL_NAME = "journal.sqlite"
ARTIFACT_NAME = "artifact"
PLACE_NAME = "serve.json"
NEXT_NAME = "next.json"
_OF_A_START = {ARTIFACT_NAME, PLACE_NAME, NEXT_NAME, *(f"{JOURNAL_NAME}{end}" for end in ("", "-wal", "-shm", ".lock"))}


def default_name(manifest: Manifest) -> str:
    """A run id out of model, time and process."""
    model = "".join(c if c.isalnum() else "-" for c in manifest.model.lower())[:24].strip("-")
    return f"{model}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def has_begun(path: Path) -> bool:
    """Whether there is a run that a new one of its name must leave alone.

    A server that was killed as it began leaves a folder without a journal, or with an empty one: nobody joined that
    run. Where anything else lies there, it is no such folder, and counts as begun.

    Raises:
        ConfigError: Another process is about to begin it.
        ArtifactError: Its journal is damaged.
    """
    if not path.exists():
        return False
    if not path.is_dir() or any(found.name not in _OF_A_START for found in path.iterdir()):
        return True
    journal_path = path / JOURNAL_NAME
    if not journal_path.exists():
        return False
    with SqliteJournal(journal_path) as journal:  # a reader would not take a file that was hardly made
        return journal.last_sequence > 0


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class RunFolder:
    """A run on disk.

    Attributes:
        path: The folder; its name is the run id.
        artifact: The copied artifact, verified.
    """

    path: Path
    artifact: Artifact

    @property
    def journal_path(self) -> Path:
        """The SQLite journal."""
        return self.path / JOURNAL_NAME

    @property
    def artifact_path(self) -> Path:
        """The copied artifact."""
        return self.path / ARTIFACT_NAME

    def document(self, settings: RunSettings) -> RunDocument:
        """The run's document for its devices."""
        size = (self.artifact_path / MANIFEST_NAME).stat().st_size
        return RunDocument(self.path.name, self.artifact.digest.hex(), size, settings)

    @classmethod
    def create(cls, runs: Path, artifact_path: Path, *, name: str | None = None, place: str | None = None) -> RunFolder:
        """Make the folder of a new run: under a hidden name, which it loses once all of it is on the disk.

        Args:
            runs: Where the runs lie; made if missing.
            artifact_path: The artifact to copy; verified before and after.
            name: Run id; made from model and time by default.
            place: Text of `serve.json`, where the run is served; only its owner can read it.

        Raises:
            ArtifactError: The artifact is damaged.
            ConfigError: The run has begun, another process makes it, or the folder cannot be written.
        """
        artifact = load_artifact(artifact_path)
        name = default_name(artifact.manifest) if name is None else name
        path = runs / check_name("run", name)
        taken = ConfigError(
            f"the run {path} exists already",
            hint=f"go on with it: fedzo serve --resume {path}, or choose another --run",
        )
        if has_begun(path):
            raise taken
        try:
            runs.mkdir(parents=True, exist_ok=True)
            # Those of starts that were killed go as well, whatever their names.
            aside = PrivateFolder(f".{name}.", ".new", parent=runs, sweep=".*.new")
            try:
                fresh = aside.path / name
                fresh.mkdir()
                shutil.copytree(artifact_path, fresh / ARTIFACT_NAME)
                if place is not None:
                    (fresh / PLACE_NAME).touch(0o600)
                    (fresh / PLACE_NAME).write_text(place)
                for made in (*fresh.rglob("*"), fresh):
                    _flush(made)
                if path.exists():
                    path.rename(aside.path / "unbegun")
                fresh.rename(path)
                _flush(runs)
            finally:
                aside.remove()
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise taken from None
            raise ConfigError(f"cannot make the run folder {path}: {error.strerror or error}") from error
        return cls(path, load_artifact(path / ARTIFACT_NAME))

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open the folder of an earlier run.

        Raises:
            ConfigError: It is no run folder.
            ArtifactError: Its artifact is damaged.
        """
        if not (path / JOURNAL_NAME).is_file():
            raise ConfigError(f"{path} is not the folder of a run: it has no {JOURNAL_NAME}", hint="see fedzo serve")
        if not (path / ARTIFACT_NAME).is_dir():
            raise ArtifactError(
                f"the run {path} has lost its folder {ARTIFACT_NAME}",
                hint=f"copy it back to {path / ARTIFACT_NAME}: the artifact that the run was begun with",
            )
        return cls(path.resolve(), load_artifact(path / ARTIFACT_NAME))

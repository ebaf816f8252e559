"""The folder of a run: its journal and a copy of the artifact. Everything else is derived from these two."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from ..edge_runtime.artifact import MANIFEST_NAME, Artifact, load_artifact
from ..protocol.documents import RunDocument
from ..protocol.errors import ConfigError
from ..protocol.manifest import Manifest
from ..protocol.settings import RunSettings
from ..protocol.topics import check_name

__all__ = ["RunFolder", "default_name"]

JOURNAL_NAME = "journal.sqlite"
ARTIFACT_NAME = "artifact"


def default_name(manifest: Manifest) -> str:
    """A run id out of model, time and process."""
    model = "".join(c if c.isalnum() else "-" for c in manifest.model.lower())[:24].strip("-")
    return f"{model}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


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
    def create(cls, runs: Path, artifact_path: Path, *, name: str | None = None) -> RunFolder:
        """Make the folder of a new run.

        Args:
            runs: Where the runs lie; made if missing.
            artifact_path: The artifact to copy; verified before and after.
            name: Run id; made from model and time by default.

        Raises:
            ArtifactError: The artifact is damaged.
            ConfigError: The folder exists or cannot be written.
        """
        artifact = load_artifact(artifact_path)
        name = default_name(artifact.manifest) if name is None else name
        path = runs / check_name("run", name)
        try:
            path.mkdir(parents=True, exist_ok=False)
            shutil.copytree(artifact_path, path / ARTIFACT_NAME)
        except FileExistsError:
            raise ConfigError(
                f"the run {path} exists already",
                hint=f"go on with it: fedzo serve --resume {path}, or choose another --run",
            ) from None
        except OSError as error:
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
        return cls(path.resolve(), load_artifact(path / ARTIFACT_NAME))

"""Rebuild a run from its journal alone."""

from __future__ import annotations

import time
from pathlib import Path

from ..protocol.coordinator import Coordinator
from ..protocol.documents import RunDocument, parse
from ..protocol.errors import ArtifactError
from .journal import Entry, Journal, SqliteJournal
from .run_folder import RunFolder

__all__ = ["begin_run", "replay_run", "run_document"]


def begin_run(journal: Journal, run: RunDocument) -> None:
    """Make the document the first entry of an empty journal, so that whatever follows can be resumed."""
    journal.append([Entry("run", 0, "", run.encode(), time.time())])


def run_document(journal: Journal, path: Path) -> RunDocument:
    """The document that the run began with.

    Raises:
        ArtifactError: The journal has none: the server was killed as it made it.
    """
    for _, entry in journal.read(kinds={"run"}):
        return parse(RunDocument, entry.payload)
    raise ArtifactError(f"the journal of {path} is empty", hint="start the run again under another name")


def replay_run(path: Path) -> tuple[RunFolder, Coordinator]:
    """Open a run for reading, also while a server writes it, and replay everything.

    Returns:
        Its folder, and a coordinator in the state of the last entry.

    Raises:
        ConfigError: ``path`` is no run folder.
        ArtifactError: Artifact or journal are damaged.
        ProtocolError: The replay gives other weights than the journal says.
    """
    folder = RunFolder.open(path)
    with SqliteJournal(folder.journal_path, read_only=True) as journal:
        run = run_document(journal, path)
        if run.manifest_sha256 != folder.artifact.digest.hex():
            raise ArtifactError(f"the artifact in {folder.artifact_path} is not the one that the run began with")
        coordinator = Coordinator(run, folder.artifact.manifest, birth=0)
        coordinator.restore((e.kind, e.round, e.device, e.payload) for _, e in journal.read())
    return folder, coordinator

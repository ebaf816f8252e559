"""Rebuild a run from its journal: quickly, as a server does when it starts, or all of it, to check it."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ...protocol.artifact.manifest import Manifest
from ...protocol.errors import ArtifactError, ConfigError, FedzoError, ProtocolError
from ...protocol.server_side.coordinator import Coordinator
from ...protocol.server_side.coordinator_events import RecordKind
from ...protocol.server_side.run_progress import RunProgress
from ...protocol.server_side.snapshots import Snapshot
from ...protocol.wire.codec import decode
from ...protocol.wire.documents import Announcement, RunDocument, parse
from ...protocol.wire.messages import UpdateRecord
from ..journal import Entry, Journal, SqliteJournal
from ..journal.schema import unbegun
from .recount import Recount
from .recovery import resume
from .run_folder import JOURNAL_NAME, RunFolder

__all__ = ["Replayed", "begin_run", "open_run", "replay_run", "replay_weights", "run_document"]

_WEIGHTS: tuple[RecordKind, ...] = ("announce", "mask", "update", "evaluation", "snapshot", "phase")


def begin_run(journal: Journal, run: RunDocument) -> None:
    """Make the document the first entry of an empty journal, so that whatever follows can be resumed."""
    journal.append([Entry("run", 0, "", run.encode(), time.time())])


def run_document(journal: Journal, path: Path) -> RunDocument:
    """The document that the run began with.

    Raises:
        ArtifactError: The journal has none.
    """
    for _, entry in journal.read(kinds={"run"}):
        return parse(RunDocument, entry.payload)
    if not journal.last_sequence:
        raise unbegun(path / JOURNAL_NAME)
    raise ArtifactError(
        f"the journal {path / JOURNAL_NAME} has no entry of the kind run, the first of every run, among its "
        f"{journal.last_sequence}",
        hint="it was changed: put a copy of the file back",
    )


@contextmanager
def open_run(path: Path) -> Iterator[tuple[RunFolder, SqliteJournal, RunDocument]]:
    """Open a run for reading, also while a server writes it.

    Raises:
        ConfigError: ``path`` is no run folder.
        ArtifactError: Artifact or journal are damaged, or do not belong together.
    """
    folder = RunFolder.open(path)
    with SqliteJournal(folder.journal_path, read_only=True) as journal:
        run = run_document(journal, path)
        if run.manifest_sha256 != folder.artifact.digest.hex():
            raise ArtifactError(f"the artifact in {folder.artifact_path} is not the one that the run began with")
        yield folder, journal, run


def replay_run(path: Path) -> tuple[RunFolder, Coordinator]:
    """The state of a run after its last entry, from the newest snapshot on.

    Returns:
        Its folder, and a coordinator in that state.

    Raises:
        ConfigError: ``path`` is no run folder.
        ArtifactError: Artifact or journal are damaged.
        ProtocolError: The replay gives other weights than the journal says.
    """
    with open_run(path) as (folder, journal, run):
        coordinator, _ = resume(lambda: Coordinator(run, folder.artifact.manifest, birth=0), journal)
    return folder, coordinator


@dataclass
class Replayed:
    """What a replay of a whole journal came to.

    Attributes:
        round: Whose weights these are: as they were when it had ended, or as they are if it is open.
        phase: What it was for.
        updates: Updates up to there.
        weights_digest: Digest of the weights, hex.
        log_head: Chain digest of the updates, hex.
        mask_sha256: Of the mask, hex; empty for the dense network.
        survivors: Weights that it keeps.
        is_last: Whether nothing in the journal is later.
        checked: By kind of entry, how many said the same as the replay.
        ends: By device that said with which weights it ended, whether they are these.
        recounted: Updates and masks that were made again out of their reports; None if that was not asked for.
    """

    round: int = 0
    phase: str = "enrol"
    updates: int = 0
    weights_digest: str = ""
    log_head: str = ""
    mask_sha256: str = ""
    survivors: int = 0
    is_last: bool = True
    checked: Counter[str] = field(default_factory=Counter)
    ends: dict[str, bool] = field(default_factory=dict)
    recounted: int | None = None


def replay_weights(
    journal: Journal, run: RunDocument, manifest: Manifest, round_: int | None = None, *, recount: bool = False
) -> Replayed:
    """Replay from the seed on, and compare every digest on the way with what the journal says.

    Args:
        journal: Of the run.
        run: Its document.
        manifest: Its artifact.
        round_: Where to end; the last round if None.
        recount: Make every update and mask again out of the reports, and compare it with the recorded one.

    Raises:
        ConfigError: There is no such round.
        ProtocolError: An entry says something else than the replay; the text names it.
    """
    progress, out = RunProgress(run, manifest), Replayed()
    again = Recount(run, manifest) if recount else None
    for sequence, entry in journal.read(_WEIGHTS if again is None else None):
        if entry.kind == "announce" and round_ is not None and entry.round > round_:
            out.is_last = False
            break
        try:
            _replay(progress, out, entry)
            if again is not None:
                again.restore([(entry.kind, entry.round, entry.device, entry.payload)])
        except (FedzoError, KeyError, TypeError, ValueError) as error:
            what = f"entry {sequence} of the journal ({entry.kind}, round {entry.round})"
            why = error.message if isinstance(error, FedzoError) else f"it cannot be read ({error})"
            hint = "the journal was changed or this machine computes something else: fedzo doctor"
            raise ProtocolError(f"{what} does not follow from those before it: {why}", hint=hint) from None
    if round_ is not None and out.round != round_:
        ends = f"it ends with round {out.round}" if out.round else "no round has begun"
        raise ConfigError(f"the journal has no round {round_}: {ends}", hint="see fedzo inspect")
    replica = progress.replica
    out.updates, out.weights_digest, out.log_head = replica.index, replica.digest.hex(), replica.head.hex()
    out.mask_sha256, out.survivors = progress.mask_sha256, progress.mask.n_survivors
    out.recounted = None if again is None else again.recounted
    return out


def _replay(progress: RunProgress, out: Replayed, entry: Entry) -> None:
    replica, said, found = progress.replica, "", ""
    if entry.kind == "announce":
        head = parse(Announcement, entry.payload)
        out.round, out.phase = head.round, head.phase
        said = f"{head.log_length} updates, mask {head.mask_sha256}, weights {head.weights_digest}, log {head.log_head}"
        weights, log = (replica.digest.hex(), replica.head.hex()) if head.log_head else ("", "")
        found = f"{replica.index} updates, mask {progress.mask_sha256}, weights {weights}, log {log}"
    elif entry.kind == "mask":
        progress.adopt_mask(entry.payload)
    elif entry.kind == "update":
        record = decode(entry.payload)
        if not isinstance(record, UpdateRecord):
            raise ProtocolError(f"it holds a {type(record).__name__}")
        replica.apply(record)
    elif entry.kind == "evaluation":
        result = json.loads(entry.payload)
        said = f"{result['log_length']} updates, weights {result['weights_digest']}"
        found = f"{replica.index} updates, weights {replica.digest.hex()}"
    elif entry.kind == "snapshot":
        if Snapshot.decode(entry.payload).replica != replica.snapshot():
            raise ProtocolError("it has other weights or moments")
    elif entry.kind == "phase" and entry.device:
        claimed = entry.payload.decode().partition(" ")[2]  # Whatever a device claims says nothing of the journal.
        out.ends[entry.device] = claimed == replica.digest.hex()
        return
    else:
        return
    if said != found:
        raise ProtocolError(f"it says {said}, the replay gives {found}")
    out.checked[entry.kind] += 1

"""What goes into the device's state machine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..artifact.graph_files import GraphFile
from ..artifact.manifest import Manifest
from ..errors import FedzoError
from ..pruning.mask import Mask
from ..wire.codec import BinaryMessage
from ..wire.documents import Document, RunDocument
from ..wire.messages import Decline, Report, ReportKind
from ..wire.topics import Channel

__all__ = [
    "BlobFound",
    "Cancel",
    "Compute",
    "Computed",
    "Connected",
    "DeviceCommand",
    "DeviceEvent",
    "Disconnected",
    "DropReport",
    "Failed",
    "FindBlob",
    "Finish",
    "GiveBack",
    "Outcome",
    "OverBudget",
    "Plan",
    "Planned",
    "Prepare",
    "Prepared",
    "Received",
    "SaveReport",
    "Send",
    "StoreBlob",
    "Task",
    "Tick",
]


# --- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connected:
    """The link to the broker is up and the subscriptions are made."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The link is down."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; due at ``wakeup`` at the latest."""


@dataclass(frozen=True, slots=True)
class Received:
    """A message came that was addressed to this device.

    Attributes:
        channel: Where it came in.
        message: Decoded and checked.
    """

    channel: Channel
    message: Document | BinaryMessage


@dataclass(frozen=True, slots=True)
class BlobFound:
    """Answer to :class:`FindBlob` and :class:`StoreBlob`.

    Attributes:
        sha256: Of the blob.
        present: Whether it is in the local store now.
        data: Its bytes, if they were asked for and are there.
    """

    sha256: bytes
    present: bool
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Planned:
    """Answer to :class:`Plan`: the run fits.

    Attributes:
        run: Id of the run.
        peak_mib: Planned peak of the process.
        micro_batch: Samples of one run of a graph.
        files: Graphs beyond the artifact's own that this machine would use, and can do without.
    """

    run: str
    peak_mib: float
    micro_batch: int
    files: tuple[GraphFile, ...] = ()


@dataclass(frozen=True, slots=True)
class Prepared:
    """Answer to :class:`Prepare`: the engine computes with this mask from now on.

    Attributes:
        run: Id of the run.
        mask_sha256: Hex hash of the encoded mask, or empty for no mask.
    """

    run: str
    mask_sha256: str


@dataclass(frozen=True, slots=True)
class OverBudget:
    """Answer to :class:`Prepare`: the engine needs more memory than it may use.

    Attributes:
        run: Id of the run.
        detail: One line for people.
    """

    run: str
    detail: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Planning or preparing failed for good; the device refuses the run.

    Attributes:
        error: Why.
        run: Id of the run that it is about; empty for any run.
    """

    error: FedzoError
    run: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a task gave.

    Attributes:
        blocks: Scalars ``float32[n]``; none if declined.
        samples: Samples behind them.
        mean_loss: At the unperturbed weights.
        queries: Forward passes.
        elapsed_ms: Time spent.
        peak_rss_kib: Peak of the process.
        decline: Why there are no blocks.
        detail: One line for people.
    """

    blocks: tuple[NDArray[np.float32], ...]
    samples: int
    mean_loss: float = 0.0
    queries: int = 0
    elapsed_ms: int = 0
    peak_rss_kib: int = 0
    decline: Decline = Decline.NONE
    detail: str = ""


@dataclass(frozen=True)
class Computed:
    """Answer to :class:`Compute`; exactly one comes for each.

    Attributes:
        number: Of the task.
        outcome: Its result, or None after :class:`Cancel`.
    """

    number: int
    outcome: Outcome | None


DeviceEvent = (
    Connected | Disconnected | Tick | Received | BlobFound | Planned | Prepared | OverBudget | Failed | Computed
)


# --- commands -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Publish a message on the device's topic of that channel, QoS 1."""

    channel: Channel
    message: Document | BinaryMessage


@dataclass(frozen=True, slots=True)
class FindBlob:
    """Look into the local store; answer with :class:`BlobFound`.

    Attributes:
        sha256: Of the blob, 32 bytes.
        read: Whether the bytes are wanted.
    """

    sha256: bytes
    read: bool


@dataclass(frozen=True, slots=True)
class StoreBlob:
    """Keep a verified blob; answer with :class:`BlobFound`.

    Attributes:
        sha256: Of the blob, 32 bytes.
        data: Its bytes.
        read: Whether the answer should carry the bytes.
        optional: The run can do without it: if it cannot be kept, say that it is not there.
    """

    sha256: bytes
    data: bytes
    read: bool
    optional: bool = False


@dataclass(frozen=True)
class Plan:
    """Plan the run's memory before anything is loaded; answer :class:`Planned` or :class:`Failed`.

    Attributes:
        run: The run.
        manifest: Its artifact.
        micro_batch: The largest that the server allows; None to choose.
    """

    run: RunDocument
    manifest: Manifest
    micro_batch: int | None = None


@dataclass(frozen=True)
class Prepare:
    """Open the engine for a mask; answer :class:`Prepared`, :class:`OverBudget` or :class:`Failed`.

    Attributes:
        run: The run.
        manifest: Its artifact; every graph is in the local store.
        mask: The survivors.
        mask_sha256: Hex hash of the encoded mask, or empty for the dense mask.
    """

    run: RunDocument
    manifest: Manifest
    mask: Mask
    mask_sha256: str


@dataclass(frozen=True)
class Task:
    """One round's work.

    Attributes:
        number: Distinguishes the tasks of this process.
        kind: What to measure.
        round: Round number, which seeds batches and directions.
        ordinal: This device's number in the run.
        positions: ``int64[k]`` for every block, directions to probe or coordinates to send; none unless training.
        weights: ``float32[n_survivors]``, a copy that belongs to the task; to be evaluated, their average if the run
            keeps one.
        weights_digest: Digest of those weights, 16 bytes.
        sigma: Length scale of the directions, a float32 value; 0 for the settings'.
        log_length: Updates before the round.
        recent: Place in the log and round of the latest of them.
    """

    number: int
    kind: ReportKind
    round: int
    ordinal: int
    positions: tuple[NDArray[np.int64], ...]
    weights: NDArray[np.float32]
    weights_digest: bytes = bytes(16)
    sigma: float = 0.0
    log_length: int = 0
    recent: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Compute:
    """Start a task; answer with one :class:`Computed`."""

    task: Task


@dataclass(frozen=True, slots=True)
class Cancel:
    """The running task is no longer wanted."""


@dataclass(frozen=True)
class SaveReport:
    """Write the report to the outbox, durably, before anything else is done."""

    run: str
    report: Report


@dataclass(frozen=True, slots=True)
class DropReport:
    """Empty the outbox.

    Attributes:
        is_lost: The report's scalars count in no update, so that a residual gets back what they carried.
    """

    is_lost: bool = False


@dataclass(frozen=True, slots=True)
class GiveBack:
    """The scalars of a round did not count: what they carried belongs into the estimator's residual again."""

    round: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Leave: everything is done, or ``error`` says why not."""

    error: FedzoError | None = None


DeviceCommand = (
    Send | FindBlob | StoreBlob | Plan | Prepare | Compute | Cancel | SaveReport | DropReport | GiveBack | Finish
)

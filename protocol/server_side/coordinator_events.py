"""What goes into the coordinator's state machine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import FedzoError
from ..pruning.mask import Mask
from ..wire.codec import BinaryMessage
from ..wire.documents import Document
from ..wire.topics import Channel
from ..wire.transfers import BlobRequest, LogRequest

__all__ = [
    "CheckScores",
    "Connected",
    "CoordinatorCommand",
    "CoordinatorEvent",
    "DeviceSaid",
    "Evaluate",
    "Finish",
    "Garbled",
    "MakeMask",
    "MaskMade",
    "OfferBlob",
    "Record",
    "RecordKind",
    "ScoresChecked",
    "Send",
    "ServeBlob",
    "ServeLog",
    "ServerEvaluated",
    "Tick",
    "WithdrawBlob",
]

RecordKind = Literal[
    "run",
    "enrolment",
    "announce",
    "report",
    "refusal",
    "garbled",
    "close",
    "mask",
    "update",
    "evaluation",
    "snapshot",
    "phase",
]
"""Kinds of entries of the journal, see docs/journal.md."""


# --- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connected:
    """The link to the broker is up; the broker may have lost everything that it retained."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; due at ``wakeup`` at the latest."""


@dataclass(frozen=True, slots=True)
class DeviceSaid:
    """A message came from a device.

    Attributes:
        device: Its id, from the topic, which the broker's access list binds to its credentials.
        channel: Where it came in.
        message: Decoded and checked.
    """

    device: str
    channel: Channel
    message: Document | BinaryMessage


@dataclass(frozen=True, slots=True)
class Garbled:
    """A device sent what is no message.

    Attributes:
        device: Its id, from the topic.
        reason: Why it is none.
    """

    device: str
    reason: str


@dataclass(frozen=True, slots=True)
class ServerEvaluated:
    """Answer to :class:`Evaluate`.

    Attributes:
        round: Of the evaluation.
        mean_loss: On the server's own test set.
        accuracy: Fraction correct.
        samples: Size of the test set.
    """

    round: int
    mean_loss: float
    accuracy: float
    samples: int


@dataclass(frozen=True, slots=True)
class MaskMade:
    """Answer to :class:`MakeMask`: the encoded mask."""

    encoded: bytes


@dataclass(frozen=True, slots=True)
class ScoresChecked:
    """Answer to :class:`CheckScores`.

    Attributes:
        round: Of the scores.
        device: Whose they are.
        difference: See :func:`~..pruning.score_checks.largest_difference`.
    """

    round: int
    device: str
    difference: float


CoordinatorEvent = Connected | Tick | DeviceSaid | Garbled | ServerEvaluated | MaskMade | ScoresChecked


# --- commands -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """Append to the journal. Everything recorded so far is durable before a later ``Send`` goes out.

    Attributes:
        kind: What the payload is.
        round: Round number.
        device: Device id, or empty.
        payload: Encoded document, message or mask.
    """

    kind: RecordKind
    round: int
    device: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Send:
    """Publish on the channel's topic, retained where the channel is; QoS 1, but 0 for receipts.

    Attributes:
        channel: The channel.
        message: What to publish.
        device: Whose topic; empty on broadcast channels.
    """

    channel: Channel
    message: Document | BinaryMessage
    device: str = ""


@dataclass(frozen=True, slots=True)
class OfferBlob:
    """Keep a blob ready for requests, by its hash."""

    sha256: bytes
    data: bytes


@dataclass(frozen=True, slots=True)
class WithdrawBlob:
    """Nobody is told of a blob any more; one that is asked for it says that it has none."""

    sha256: bytes


@dataclass(frozen=True, slots=True)
class ServeBlob:
    """Answer a device's request for a block, with an empty one if the blob is not offered."""

    device: str
    request: BlobRequest


@dataclass(frozen=True, slots=True)
class ServeLog:
    """Answer a device's request for update records out of the journal."""

    device: str
    request: LogRequest


@dataclass(frozen=True)
class Evaluate:
    """Evaluate on the server's own test set; answer with :class:`ServerEvaluated`.

    Attributes:
        round: Of the evaluation.
        mask: The survivors.
        weights: ``float32[n_survivors]``, a copy.
    """

    round: int
    mask: Mask
    weights: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class MakeMask:
    """Make the run's mask by a method that needs forward passes of the server; answer with :class:`MaskMade`."""


@dataclass(frozen=True)
class CheckScores:
    """Compute a device's scores again, answer with :class:`ScoresChecked`.

    Attributes:
        round: Of the scores.
        device: Whose they are.
        ordinal: The device's number, which decides its inputs.
        mask: The survivors.
        weights: ``float32[n_survivors]``, which nobody changes any more.
        blocks: What it reported.
    """

    round: int
    device: str
    ordinal: int
    mask: Mask
    weights: NDArray[np.float32]
    blocks: tuple[NDArray[np.float32], ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """Stop serving: the run is done, or ``error`` says why it stopped. A stopped run can be resumed."""

    error: FedzoError | None = None


CoordinatorCommand = (
    Record | Send | OfferBlob | WithdrawBlob | ServeBlob | ServeLog | Evaluate | MakeMask | CheckScores | Finish
)

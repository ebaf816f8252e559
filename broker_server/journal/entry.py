"""What a journal holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from ...protocol.server_side.coordinator_events import RecordKind

__all__ = ["KINDS", "Entry"]

KINDS: frozenset[str] = frozenset(get_args(RecordKind))

_MAX_ROUND = (1 << 63) - 1  # an SQLite integer


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened in a run.

    Attributes:
        kind: What the payload is.
        round: Round number, 0 when there is none.
        device: Device id, empty when it concerns all.
        payload: Encoded document, message or mask.
        at: Unix time in seconds.
    """

    kind: RecordKind
    round: int
    device: str
    payload: bytes
    at: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is no kind of entry; known are {sorted(KINDS)}")
        if not 0 <= self.round <= _MAX_ROUND:
            raise ValueError(f"round {self.round} is negative or too large")
        if not isinstance(self.payload, bytes) or not isinstance(self.device, str):
            raise TypeError(f"device {self.device!r} must be text, and the payload bytes")
        if not math.isfinite(self.at):
            raise ValueError(f"the time {self.at} is not finite")

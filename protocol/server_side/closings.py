"""How a round ended, for the journal: what the entries around it do not say."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from ..errors import ProtocolError
from .open_round import Ending, OpenRound

__all__ = ["Closing"]


@dataclass(frozen=True, slots=True)
class Closing:
    """The end of one round.

    Attributes:
        ending: What it had come to.
        asked: Devices that it asked.
        answered: Reports that were accepted, those without scalars included.
        usable: Devices of which a report counts, also a late one.
        in_time: Whether it ended before its deadline.
    """

    ending: Ending
    asked: int
    answered: int
    usable: int
    in_time: bool

    @classmethod
    def of(cls, current: OpenRound, ending: Ending, now: float) -> Closing:
        """The end of a round that is still open."""
        in_time = not current.is_overdue and (current.deadline is None or now < current.deadline)
        return cls(ending, len(current.participants), len(current.reports), current.n_counted, in_time)

    def encode(self) -> bytes:
        """The payload of the entry: JSON."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, payload: bytes) -> Closing:
        """Inverse of :meth:`encode`.

        Raises:
            ProtocolError: The bytes are no such entry.
        """
        try:
            return cls(**json.loads(payload))
        except (TypeError, ValueError):
            raise ProtocolError(f"{payload[:80]!r} does not say how a round ended") from None

"""What an announced round hands out, as the server and every device derive it from the same announcement."""

from __future__ import annotations

from collections.abc import Sequence

from .blocks import Block, Deal, deal
from .documents import Announcement, unpack_participants
from .settings import RunSettings

__all__ = ["deals_of"]


def deals_of(settings: RunSettings, blocks: Sequence[Block], head: Announcement) -> tuple[Deal, ...]:
    """The positions of every block that a round hands out; none unless weights are trained.

    Args:
        settings: Of the run.
        blocks: Of its weights.
        head: The announcement.

    Raises:
        ProtocolError: The set of participants cannot be unpacked.
    """
    if head.phase != "train":
        return ()
    training, n_devices = settings.training, max(1, unpack_participants(head.participants).size)
    return deal(
        blocks,
        training.assignment,
        head.log_length,
        n_devices,
        k=head.k,
        k_max=training.k_max,
        n_rounds=1 + settings.staleness,
    )

"""What an announced round hands out, as the server and every device derive it from the same announcement."""

from __future__ import annotations

from collections.abc import Sequence

from ..server_side.pace import unpack_levels
from ..settings import RunSettings
from ..wire.documents import Announcement
from ..wire.participants import unpack_participants
from .blocks import Block, Deal, deal

__all__ = ["deals_of"]


def deals_of(settings: RunSettings, blocks: Sequence[Block], head: Announcement) -> tuple[Deal, ...]:
    """The positions of every block that a round hands out; none unless weights are trained.

    Args:
        settings: Of the run.
        blocks: Of its weights.
        head: The announcement.

    Raises:
        ProtocolError: The participants or their levels cannot be unpacked.
    """
    if head.phase != "train":
        return ()
    training, n_devices = settings.training, max(1, unpack_participants(head.participants).size)
    levels = unpack_levels(head.pace, n_devices)
    return deal(
        blocks,
        training.assignment,
        head.log_length,
        n_devices,
        k=head.k,
        k_max=training.k_max,
        n_rounds=1 + settings.staleness,
        k_min=training.k_min,
        levels=levels,
    )

"""Who a round asks: drawn by the run's seed from the devices that are ready, in turns when there are too many.

A round may ask for more devices than it needs and close as soon as enough have answered, so that slow and lost ones
cost nobody time: over-selection, as in Bonawitz et al., "Towards federated learning at scale: system design" (MLSys
2019, section 2.2), which asks for 130 %.

The draw depends on the seed, the round and who is ready. Who is ready is known to one server at one time only, so the
outcome is what counts: it stands in the announcement, which is journaled before anybody hears it, and a restarted
server goes on with that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..perturbation.streams import Purpose, uint64s
from .roster import Member

__all__ = ["select"]


def select(seed: int, round_: int, ready: Sequence[Member], *, wanted: int, most: int) -> list[Member]:
    """The devices that a round asks, in the order of ordinals.

    Args:
        seed: Run seed.
        round_: Round number.
        ready: Devices that it can count on, in the order of ordinals.
        wanted: How many to draw: those with the smallest of seeded words, one an ordinal; 0 for all.
        most: How many one update has room for. When there are more, they take turns.
    """
    members = list(ready)
    if 0 < wanted < len(members):
        ordinals = np.array([member.ordinal for member in members], dtype=np.int64)
        words = uint64s(seed, Purpose.PARTICIPANTS, round_, 0, int(ordinals.max()) + 1)[ordinals]
        members = [members[i] for i in sorted(np.argsort(words, kind="stable")[:wanted].tolist())]
    if len(members) > most:
        start = round_ * most % len(members)
        members = sorted((members + members)[start : start + most], key=lambda member: member.ordinal)
    return members

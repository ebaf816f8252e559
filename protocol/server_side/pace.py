"""Fewer directions for slow boards, so that they do not set the pace of a round.

Every report says how long its queries took. A board that needs more than the median of the devices that a round asks
gets half of the directions, a quarter, and so on, as long as that is at least ``--k-min``: the more of them answer in
time, the more data count. The mean over all directions of a round counts every direction alike, so a board with fewer
of them counts less in it. Work by what a device can do, in place of the same work for all, is what FedProx calls
variable amounts of work (Li et al., MLSys 2020, arXiv 1812.06127).

Only the server decides, by times that are in the journal; the announcement says it, one level a participant, so every
side knows who evaluates which directions. A board that says that it is slow gets less to do, and nothing else.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from statistics import median_low
from typing import TYPE_CHECKING

from ..errors import ProtocolError

if TYPE_CHECKING:
    from .roster import Member

__all__ = ["MAX_LEVEL", "paced_levels", "pack_levels", "unpack_levels"]

MAX_LEVEL = 15
TOLERANCE = 1.25
"""Times vary: a board that is slower than the median by less than this gets as much as the others."""


def paced_levels(members: Sequence[Member], k: int, k_min: int) -> list[int]:
    """How often to halve the directions of every participant.

    Args:
        members: In the order of ordinals.
        k: Directions of a device that is not slow.
        k_min: The least; 0 to give all the same.
    """
    known = [member.query_ms for member in members if 0 < member.query_ms < math.inf]
    if k_min == 0 or len(known) < 2:
        return [0] * len(members)
    most = min(MAX_LEVEL, int(math.log2(k / k_min))) if k > k_min else 0
    usual = TOLERANCE * median_low(known)
    times = [member.query_ms / usual if member.query_ms > 0 else 1.0 for member in members]
    return [min(most, math.ceil(math.log2(min(max(each, 1.0), 2.0**MAX_LEVEL)))) for each in times]


def pack_levels(levels: Sequence[int]) -> bytes:
    """One byte a level, zlib; empty if all are 0."""
    return zlib.compress(bytes(levels), 9) if any(levels) else b""


def unpack_levels(packed: bytes, n_devices: int) -> tuple[int, ...]:
    """Inverse of :func:`pack_levels`; empty if all are 0.

    Raises:
        ProtocolError: The bytes have not one level for every participant.
    """
    if not packed:
        return ()
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(packed, n_devices + 1)
    except zlib.error:
        raise ProtocolError("the levels of the participants cannot be unpacked") from None
    if len(data) != n_devices or not inflater.eof or inflater.unused_data or max(data) > MAX_LEVEL:
        raise ProtocolError(f"there is not one level of 0 to {MAX_LEVEL} for each of {n_devices} participants")
    return tuple(data)

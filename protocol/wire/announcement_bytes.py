"""The bytes of an announcement: every device gets one every round, so that they are few.

The byte table is in ``docs/protocol.md``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from ..errors import ProtocolError
from .framing import DIGEST_BYTES, VERSION, MessageType

__all__ = ["PHASES", "pack_announcement", "unpack_announcement"]

PHASES = ("enrol", "saliency", "train", "evaluate", "done")
_ANNOUNCEMENT = struct.Struct("<BBBBIIHHfI")
_HAS_LOG_HEAD, _HAS_WEIGHTS_DIGEST, _HAS_PACE, _PHASE = 16, 32, 64, 15
_HASH_BYTES = 32
_LENGTH = struct.Struct("<H")


def pack_announcement(fields: Mapping[str, Any]) -> bytes:
    """The payload of an announcement, by the names of its attributes."""
    run: bytes = fields["run"].encode("ascii")
    participants: bytes = fields["participants"]
    flags = PHASES.index(fields["phase"])
    flags |= _HAS_LOG_HEAD if fields["log_head"] else 0
    flags |= _HAS_WEIGHTS_DIGEST if fields["weights_digest"] else 0
    flags |= _HAS_PACE if fields["pace"] else 0
    head = _ANNOUNCEMENT.pack(
        VERSION,
        MessageType.ANNOUNCEMENT,
        flags,
        len(run),
        fields["round"],
        fields["log_length"],
        len(participants),
        fields["k"],
        fields["sigma"],
        fields["mask_size"],
    )
    digests = (fields["mask_sha256"], fields["log_head"], fields["weights_digest"])
    pace = _LENGTH.pack(len(fields["pace"])) + fields["pace"] if fields["pace"] else b""
    return head + run + participants + b"".join(map(bytes.fromhex, digests)) + pace


def unpack_announcement(data: bytes) -> dict[str, Any]:
    """Inverse of :func:`pack_announcement`; the values themselves are for the caller to check.

    Raises:
        ProtocolError: The length is wrong, the phase is unknown, or it is another kind of message.
        struct.error: There are fewer bytes than a header has.
        UnicodeDecodeError: The run id is not ASCII.
    """
    version, kind, flags, n_run, round_, length, n_set, k, sigma, mask_size = _ANNOUNCEMENT.unpack_from(data)
    if version != VERSION or kind != MessageType.ANNOUNCEMENT:
        raise ProtocolError(f"a message of version {version} and type {kind} is no announcement")
    if flags >> 7 or flags & _PHASE >= len(PHASES):
        raise ProtocolError(f"an announcement has the unknown phase or flags {flags}")
    names = ("run", "participants", "mask_sha256", "log_head", "weights_digest")
    sizes = (
        n_run,
        n_set,
        _HASH_BYTES if mask_size else 0,
        DIGEST_BYTES if flags & _HAS_LOG_HEAD else 0,
        DIGEST_BYTES if flags & _HAS_WEIGHTS_DIGEST else 0,
    )
    end, n_pace = _ANNOUNCEMENT.size + sum(sizes), 0
    if flags & _HAS_PACE:
        (n_pace,), end = _LENGTH.unpack_from(data, end), end + _LENGTH.size
    if len(data) != end + n_pace or bool(n_pace) != bool(flags & _HAS_PACE):
        raise ProtocolError(f"an announcement of {len(data)} bytes should have {end + n_pace}")
    found: dict[str, Any] = {
        "round": round_,
        "phase": PHASES[flags & _PHASE],
        "log_length": length,
        "k": k,
        "sigma": sigma,
        "mask_size": mask_size,
        "pace": data[end:],
    }
    place = _ANNOUNCEMENT.size
    for name, size in zip(names, sizes, strict=True):
        part, place = data[place : place + size], place + size
        found[name] = part if name == "participants" else part.decode("ascii") if name == "run" else part.hex()
    return found

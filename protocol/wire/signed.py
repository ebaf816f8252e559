"""Documents that carry the signature of the run's key: which, over what, and in what form.

======================  =====================================================================
channel                 payload
======================  =====================================================================
``run``                 document, then the public key (32 bytes), then the signature (64 bytes)
``head``, ``cmd``       document, then the signature (64 bytes)
``block``, an offer     :class:`~.transfers.SnapshotOffer`, then the signature (64 bytes)
======================  =====================================================================

The signature covers the topic's meaning too, so that no document can be moved to another federation, channel or device.
What is not signed follows from what is: the run document names the SHA-256 of the artifact's manifest, which names that
of every graph; an announcement names the SHA-256 of the mask and the chain digest of the log, which covers each update
record before it; the offer of a snapshot names the SHA-256 of the weights. Receipts change nothing that matters,
and other blocks nothing that these hashes do not cover.
"""

from __future__ import annotations

from ..errors import ProtocolError
from .ed25519 import KEY_BYTES, SIGNATURE_BYTES, verify
from .framing import MessageType
from .topics import Channel

__all__ = ["SIGNED", "attach", "check", "detach", "is_signed", "signed_bytes"]

SIGNED = (Channel.RUN, Channel.HEAD, Channel.COMMAND)
_OFFER = bytes((MessageType.SNAPSHOT_OFFER,))
_CONTEXT = b"fedzo/v1 signed document\0"


def is_signed(channel: Channel, payload: bytes = b"") -> bool:
    """Whether what travels on this channel carries a signature.

    Args:
        channel: The channel.
        payload: With or without the signature; on ``block`` its type decides.
    """
    return channel in SIGNED or (channel is Channel.BLOCK and payload[1:2] == _OFFER)


def signed_bytes(federation: str, channel: Channel, device: str, document: bytes) -> bytes:
    """What the signature of a document is made over; no name holds a zero byte."""
    place = f"{federation}\x00{channel.value}\x00{device}".encode()
    return _CONTEXT + place + b"\0" + document


def attach(channel: Channel, document: bytes, public_key: bytes, signature: bytes) -> bytes:
    """The payload; only the run document brings the key along."""
    return document + (public_key if channel is Channel.RUN else b"") + signature


def detach(channel: Channel, payload: bytes) -> tuple[bytes, bytes, bytes]:
    """Inverse of :func:`attach`: document, public key (empty unless on ``run``), signature.

    Raises:
        ProtocolError: It is too short to be signed.
    """
    end = len(payload) - SIGNATURE_BYTES
    start = end - (KEY_BYTES if channel is Channel.RUN else 0)
    if start < 1:
        raise ProtocolError(f"a document of {len(payload)} bytes carries no signature")
    return payload[:start], payload[start:end], payload[end:]


def check(federation: str, channel: Channel, device: str, payload: bytes, public_key: bytes) -> bytes:
    """The document of a payload that this key has signed.

    Raises:
        ProtocolError: It has not.
    """
    document, _, signature = detach(channel, payload)
    if not verify(public_key, signed_bytes(federation, channel, device, document), signature):
        raise ProtocolError(f"a document on {channel.value} is not signed by the run's key")
    return document

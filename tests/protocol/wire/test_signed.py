"""Signed documents: what the signature covers, and that nothing else than the channel's document comes out."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzo.protocol.errors import ProtocolError
from fedzo.protocol.wire.signed import SIGNED, attach, check, detach, is_signed, signed_bytes
from fedzo.protocol.wire.topics import FROM_DEVICE, Channel
from fedzo.protocol.wire.transfers import SnapshotOffer
from tests.protocol.golden.message_cases import MESSAGES

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC = KEY.public_key().public_bytes_raw()
OFFER = next(name for name, message in MESSAGES.items() if isinstance(message, SnapshotOffer))
DOCUMENT = b'{"kind":"head"}'


def signed(federation: str, channel: Channel, device: str, document: bytes) -> bytes:
    return attach(channel, document, PUBLIC, KEY.sign(signed_bytes(federation, channel, device, document)))


@pytest.mark.parametrize("channel", SIGNED)
def test_a_document_comes_back(channel: Channel) -> None:
    payload = signed("farm", channel, "dev", DOCUMENT)
    assert check("farm", channel, "dev", payload, PUBLIC) == DOCUMENT
    assert detach(channel, payload)[1] == (PUBLIC if channel is Channel.RUN else b"")


def test_what_the_server_says_of_the_run_is_signed_and_nothing_of_a_device() -> None:
    assert {channel for channel in Channel if is_signed(channel)} == {Channel.RUN, Channel.HEAD, Channel.COMMAND}
    offer = MESSAGES[OFFER].encode()
    assert {channel for channel in Channel if is_signed(channel, offer)} == {*SIGNED, Channel.BLOCK}
    for name, message in MESSAGES.items():
        assert is_signed(Channel.BLOCK, message.encode()) == (name == OFFER)
    assert not set(SIGNED) & set(FROM_DEVICE)


@pytest.mark.parametrize(
    ("federation", "channel", "device"),
    [("barn", Channel.COMMAND, "dev"), ("farm", Channel.HEAD, "dev"), ("farm", Channel.COMMAND, "dev-2"),
     ("farm", Channel.COMMAND, "")],
)  # fmt: skip
def test_a_document_cannot_be_moved(federation: str, channel: Channel, device: str) -> None:
    payload = signed("farm", Channel.COMMAND, "dev", DOCUMENT)
    with pytest.raises(ProtocolError, match="not signed by the run's key"):
        check(federation, channel, device, payload, PUBLIC)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_changed_bit_is_noticed(data: st.DataObject) -> None:
    payload = bytearray(signed("farm", Channel.HEAD, "", DOCUMENT))
    bit = data.draw(st.integers(0, 8 * len(payload) - 1))
    payload[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError):
        check("farm", Channel.HEAD, "", bytes(payload), PUBLIC)


@given(st.sampled_from(SIGNED), st.binary(max_size=200))
@settings(deadline=None)
def test_foreign_bytes_are_a_protocol_error(channel: Channel, payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        check("farm", channel, "dev", payload, PUBLIC)


def test_another_key_is_another_key() -> None:
    other = Ed25519PrivateKey.from_private_bytes(bytes([1] * 32)).public_key().public_bytes_raw()
    with pytest.raises(ProtocolError):
        check("farm", Channel.HEAD, "", signed("farm", Channel.HEAD, "", DOCUMENT), other)

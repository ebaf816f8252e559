"""The board's pin: first use, restarts, other keys, documents that come in another order."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedzo.broker_server.security.signing import RunSigner
from fedzo.edge_runtime.connection.mqtt_types import Arrived
from fedzo.edge_runtime.storage.run_key import RunKey, parse_run_key
from fedzo.protocol.errors import ArtifactError, ConfigError, ProtocolError
from fedzo.protocol.wire.documents import Order
from fedzo.protocol.wire.topics import Channel, topic
from fedzo.protocol.wire.transfers import SnapshotOffer
from tests.protocol.golden.message_cases import MESSAGES

SESSION = 7
ANSWER = Order("run-1", "enrol", SESSION).encode()
OURS, THEIRS = (RunSigner(Ed25519PrivateKey.from_private_bytes(bytes([seed] * 32))) for seed in (1, 2))


def arrived(channel: Channel, document: bytes, signer: RunSigner = OURS, *, payload: bytes | None = None) -> Arrived:
    device = "dev" if channel is Channel.COMMAND else ""
    payload = signer.sign("farm", channel, device, document) if payload is None else payload
    return Arrived(topic("farm", channel, device), payload, True, None)


def pin(tmp_path: Path, **settings: object) -> RunKey:
    return RunKey(tmp_path / "run-key", "farm", "dev", SESSION, **settings)  # type: ignore[arg-type]  # tests


def test_the_first_run_is_trusted_and_no_other_ever_after(tmp_path: Path) -> None:
    said: list[str] = []
    key = pin(tmp_path, say=said.append)
    assert key.key is None
    assert key.open(arrived(Channel.RUN, b"run 1")) == b"run 1"
    assert key.key is None, "nobody has answered"
    assert key.open(arrived(Channel.COMMAND, ANSWER)) == ANSWER
    assert key.key == OURS.public_key
    assert OURS.public_key.hex() in said[0]
    assert key.open(arrived(Channel.HEAD, b"head 1")) == b"head 1"
    assert key.open(arrived(Channel.HEAD, b"head 1")) == b"head 1", "a repetition"
    assert key.open(arrived(Channel.COMMAND, b"order")) == b"order"
    for channel in (Channel.RUN, Channel.HEAD, Channel.COMMAND):
        with pytest.raises(ProtocolError):
            key.open(arrived(channel, b"forged", THEIRS))
    again = pin(tmp_path)
    assert again.key == OURS.public_key
    with pytest.raises(ArtifactError, match=f"{THEIRS.public_key.hex()}, this device trusts {OURS.public_key.hex()}"):
        again.open(arrived(Channel.RUN, b"run 2", THEIRS))
    assert again.open(arrived(Channel.RUN, b"run 2")) == b"run 2"
    assert len(said) == 1


def test_a_run_that_nobody_answers_for_pins_nothing(tmp_path: Path) -> None:
    """A broker that was used before keeps the documents of its last run, and perhaps what that said to this board."""
    key = pin(tmp_path)
    assert key.open(arrived(Channel.RUN, b"stale", THEIRS)) == b"stale", "the board says hello to it"
    assert key.open(arrived(Channel.HEAD, b"stale", THEIRS)) is None
    earlier = Order("run-0", "welcome", SESSION - 1).encode()
    assert key.open(arrived(Channel.COMMAND, earlier, THEIRS)) == earlier
    with pytest.raises(ProtocolError):
        key.open(arrived(Channel.COMMAND, ANSWER))  # of a run that has not been heard of yet
    assert key.key is None
    assert not (tmp_path / "run-key").exists()
    assert key.open(arrived(Channel.RUN, b"run 1")) == b"run 1"
    with pytest.raises(ProtocolError):
        key.open(arrived(Channel.COMMAND, earlier, THEIRS))
    assert key.early() is None
    assert key.open(arrived(Channel.HEAD, b"head 1")) is None
    assert key.open(arrived(Channel.COMMAND, ANSWER)) == ANSWER
    assert key.key == pin(tmp_path).key == OURS.public_key
    early = key.early()
    assert early is not None
    assert key.open(early) == b"head 1"
    with pytest.raises(ProtocolError):
        key.open(arrived(Channel.RUN, b"stale", THEIRS))


def test_a_given_key_holds_from_the_first_run_on(tmp_path: Path) -> None:
    key = pin(tmp_path, given=OURS.public_key)
    with pytest.raises(ArtifactError) as caught:
        key.open(arrived(Channel.RUN, b"forged", THEIRS))
    assert f"--run-key {THEIRS.public_key.hex()}" in caught.value.hint
    assert not isinstance(caught.value, ProtocolError), "the agent would only drop the payload"
    assert pin(tmp_path).key == OURS.public_key
    assert pin(tmp_path, given=THEIRS.public_key).open(arrived(Channel.RUN, b"run", THEIRS)) == b"run"
    assert pin(tmp_path).key == THEIRS.public_key, "an operator's word replaces the pin"


def test_what_is_not_signed_is_dropped_and_pins_nothing(tmp_path: Path) -> None:
    key = pin(tmp_path)
    good = OURS.sign("farm", Channel.RUN, "", b"run")
    for payload in (b"", b"run", good[:-1], good[:-64] + bytes(64), b"x" + good[1:], bytes(200)):
        with pytest.raises(ProtocolError):
            key.open(arrived(Channel.RUN, b"", payload=payload))
    assert key.key is None
    assert not (tmp_path / "run-key").exists()


def test_what_was_signed_for_others_is_not_for_this_board(tmp_path: Path) -> None:
    key = pin(tmp_path, given=OURS.public_key)
    for federation, device in (("barn", "dev"), ("farm", "dev-2")):
        moved = OURS.sign(federation, Channel.COMMAND, device, b"order")
        for place in (topic("farm", Channel.COMMAND, "dev"), topic(federation, Channel.COMMAND, device)):
            with pytest.raises(ProtocolError):
                key.open(Arrived(place, moved, False, None))
    with pytest.raises(ProtocolError):
        key.open(Arrived(topic("farm", Channel.RUN), OURS.sign("barn", Channel.RUN, "", b"run"), True, None))


def test_an_announcement_that_came_first_waits(tmp_path: Path) -> None:
    key = pin(tmp_path)
    old, head = arrived(Channel.HEAD, b"old"), arrived(Channel.HEAD, b"head")
    assert key.open(old) is None
    assert key.open(head) is None
    assert key.open(arrived(Channel.COMMAND, b"order")) is None
    assert key.early() is None
    key.open(arrived(Channel.RUN, b"run"))
    assert key.early() is None
    key.open(arrived(Channel.COMMAND, ANSWER))
    assert key.early() is head
    assert key.early() is None
    assert key.open(head) == b"head"


def test_the_offer_of_weights_is_signed_other_blocks_are_not(tmp_path: Path) -> None:
    key = pin(tmp_path, given=OURS.public_key)
    place = topic("farm", Channel.BLOCK, "dev")
    for message in MESSAGES.values():
        payload = message.encode()
        signed = OURS.sign("farm", Channel.BLOCK, "dev", payload)
        if not isinstance(message, SnapshotOffer):
            assert key.open(Arrived(place, payload, False, None)) == payload == signed
            continue
        assert key.open(Arrived(place, signed, False, None)) == payload
        for forged in (payload, payload + bytes(64), THEIRS.sign("farm", Channel.BLOCK, "dev", payload)):
            with pytest.raises(ProtocolError):
                key.open(Arrived(place, forged, False, None))


def test_what_is_not_signed_by_design_passes(tmp_path: Path) -> None:
    for channel in (Channel.SERVER, Channel.LOG):
        assert pin(tmp_path).open(arrived(channel, b"", payload=b"as it is")) == b"as it is"


def test_a_damaged_pin_is_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "run-key").write_text("00" * 32)
    with pytest.raises(ConfigError, match="run-key") as caught:
        pin(tmp_path)
    assert "--run-key" in caught.value.hint


def test_a_pin_that_cannot_be_kept_is_said(tmp_path: Path) -> None:
    key = RunKey(tmp_path / "nowhere" / "run-key", "farm", "dev", SESSION)
    key.open(arrived(Channel.RUN, b"run"))
    with pytest.raises(ConfigError, match="cannot keep"):
        key.open(arrived(Channel.COMMAND, ANSWER))


@pytest.mark.parametrize("text", ["", "zz", "00" * 32, "01" + "00" * 31, "ff" * 32, OURS.public_key.hex()[:-2]])
def test_texts_that_are_no_key(text: str) -> None:
    with pytest.raises(ConfigError, match="no public key"):
        parse_run_key(text)
    assert parse_run_key(f" {OURS.public_key.hex().upper()}\n") == OURS.public_key


def test_the_signers_key_is_private_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "run.key"
    signer = RunSigner.open(path)
    assert RunSigner.open(path).public_key == signer.public_key
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["run.key"]
    path.write_text("no key")
    with pytest.raises(ConfigError, match="no private key"):
        RunSigner.open(path)

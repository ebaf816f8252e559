"""What enters the server is of a type that a device may send there; nothing else is read further."""

from __future__ import annotations

import pytest

from fedzo.broker_server.intake import Drops, Intake
from fedzo.edge_runtime.connection.transport import Arrived
from fedzo.protocol.server_side import coordinator_events as machine
from fedzo.protocol.wire import codec
from fedzo.protocol.wire.framing import RUN_TAG_BYTES
from fedzo.protocol.wire.messages import Receipt, Verdict
from fedzo.protocol.wire.topics import Channel, topic
from fedzo.protocol.wire.transfers import BlobBlock, BlobRequest, LogRequest

WANTED = (BlobRequest(bytes(32), 0, 10), LogRequest(3, 5))
STRANGE = (Receipt(bytes(RUN_TAG_BYTES), 3, Verdict.LATE), BlobBlock(bytes(32), total=1, offset=0, data=b"x"))


@pytest.mark.parametrize("message", WANTED)
def test_a_request_is_heard(message: BlobRequest | LogRequest) -> None:
    drops = Drops()
    heard = Intake("farm", drops).event(Arrived(topic("farm", Channel.GET, "a"), message.encode(), False, None))
    assert heard == machine.DeviceSaid("a", Channel.GET, message)
    assert drops.counts["undecodable"] == 0


@pytest.mark.parametrize("channel", [Channel.GET, Channel.REPORT])
@pytest.mark.parametrize("message", STRANGE)
def test_what_only_a_server_sends_is_not_read(
    message: Receipt | BlobBlock, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(data: bytes) -> codec.BinaryMessage:
        raise AssertionError(f"{len(data)} bytes were read")

    monkeypatch.setattr(codec, "_DECODERS", dict.fromkeys(codec._DECODERS, fails))
    drops = Drops()
    heard = Intake("farm", drops).event(Arrived(topic("farm", channel, "a"), message.encode(), False, None))
    assert isinstance(heard, machine.Garbled)
    assert "does not belong here" in heard.reason
    assert drops.counts["undecodable"] == 1


def test_what_is_sent_to_devices_is_no_word_of_theirs() -> None:
    drops = Drops()
    heard = Intake("farm", drops).event(Arrived(topic("farm", Channel.ACK, "a"), WANTED[0].encode(), False, None))
    assert isinstance(heard, machine.Garbled)
    assert drops.counts["undecodable"] == 1

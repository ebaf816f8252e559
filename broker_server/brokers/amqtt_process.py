"""The process of the embedded broker: HOST PORT, and on standard input one line of JSON with the credentials.

amqtt does the work. In front of it this module reads the CONNECT packet, because amqtt 0.12 takes an MQTT 5 CONNECT
with properties for 3.1.1 and waits for bytes that never come, and because it never notices a client that went silent:

- another version than 3.1.1 is refused as MQTT 3.1.1, section 3.1.2.2, says, so that clients can fall back;
- a link without CONNECT within 10 s, or silent for 1.5 times its keep-alive, is closed, and its will is published;
- a CONNECT above 128 KiB, or any packet above 4 MiB, is not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from functools import partial
from typing import Any

from amqtt.adapters import StreamReaderAdapter, StreamWriterAdapter
from amqtt.broker import Broker as AmqttBroker

from . import amqtt_rights
from .credentials import Credentials

__all__ = ["main"]

_log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 10.0
_MAX_CONNECT_BYTES = 128 << 10
_MAX_PACKET_BYTES = 4 << 20
_CONNECT = 0x10
_REFUSED_VERSION = b"\x20\x02\x00\x01"
_LEVEL_3_1_1 = 4
_LISTENER = "default"


class _Refused(Exception):  # noqa: N818 (a way out, not an error)
    """The client is told, or not worth telling, why it is cut off."""


class _TimedReader(StreamReaderAdapter):  # type: ignore[misc]  # amqtt ships no types
    """Gives amqtt the CONNECT packet again, then the stream, and ends it after too long a silence."""

    def __init__(self, reader: asyncio.StreamReader, packet: bytes, silence_s: float | None) -> None:
        super().__init__(reader)
        self._again = packet
        self._silence_s = silence_s

    async def read(self, n: int = -1) -> bytes:
        """Read exactly `n` bytes."""
        if self._again and n >= 0:
            data, self._again = self._again[:n], self._again[n:]
            return data
        if n > _MAX_PACKET_BYTES:
            raise asyncio.IncompleteReadError(b"", n)
        try:
            data = await asyncio.wait_for(super().read(n), self._silence_s)
        except asyncio.TimeoutError:
            raise asyncio.IncompleteReadError(b"", n) from None  # what amqtt takes for a lost link
        return bytes(data)


async def _read_connect(reader: asyncio.StreamReader) -> tuple[bytes, int]:
    """Read the first packet.

    Returns:
        The packet, with its keep-alive set to 0, and its keep-alive in seconds.
    """
    header = await reader.readexactly(2)
    if header[0] != _CONNECT:
        raise _Refused
    length, shift = header[1] & 0x7F, 7
    while header[-1] & 0x80:
        if shift > 21:
            raise _Refused
        header += await reader.readexactly(1)
        length |= (header[-1] & 0x7F) << shift
        shift += 7
    if not 12 <= length <= _MAX_CONNECT_BYTES:
        raise _Refused
    body = await reader.readexactly(length)
    name_end = 2 + int.from_bytes(body[:2], "big")
    if body[2:name_end] != b"MQTT" or body[name_end] != _LEVEL_3_1_1:
        raise _Refused(_REFUSED_VERSION)
    # amqtt's own timer only starts its read over, possibly in the middle of a header: keep-alive is 0 for it.
    keepalive = slice(name_end + 2, name_end + 4)
    return header + body[: keepalive.start] + b"\0\0" + body[keepalive.stop :], int.from_bytes(body[keepalive], "big")


async def _accept(broker: AmqttBroker, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        packet, keepalive_s = await asyncio.wait_for(_read_connect(reader), _CONNECT_TIMEOUT_S)
        timed = _TimedReader(reader, packet, 1.5 * keepalive_s if keepalive_s else None)
        await broker.external_connected(timed, StreamWriterAdapter(writer), _LISTENER)
    except _Refused as refused:
        writer.write(b"".join(refused.args))
        with contextlib.suppress(OSError):
            await writer.drain()
    except (OSError, EOFError, asyncio.TimeoutError):
        pass  # gone, or never spoke
    except Exception:  # noqa: BLE001 (one connection must not end the broker)
        _log.exception("a connection failed")
    finally:
        writer.close()


async def _serve(host: str, port: int, credentials: Credentials | None) -> None:
    amqtt_rights.CREDENTIALS = credentials
    plugins: dict[str, Any] = {f"{amqtt_rights.__name__}.LoginPlugin": {}}
    if credentials is not None:
        plugins[f"{amqtt_rights.__name__}.TopicPlugin"] = {}
    broker = AmqttBroker({"listeners": {_LISTENER: {"type": "external"}}, "plugins": plugins})
    await broker.start()
    server = await asyncio.start_server(partial(_accept, broker), host, port)
    async with server:
        await asyncio.to_thread(sys.stdin.buffer.read)  # ends when the parent is gone, on every system


def main() -> None:
    """Serve until standard input ends."""
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(name)s: %(message)s")
    document = json.loads(sys.stdin.buffer.readline())
    credentials = None if document is None else Credentials.from_document(document)
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), credentials))


if __name__ == "__main__":
    main()

"""The process of the embedded broker: HOST PORT, and on standard input lines of JSON with credentials and TLS files.

The first line says how to start. A later one brings other credentials: who has none any more is cut off, and the TLS
files, the revocation list among them, are read again for the connections that follow.

amqtt does the work. In front of it this module reads the CONNECT packet, because amqtt 0.12 takes an MQTT 5 CONNECT
with properties for 3.1.1 and waits for bytes that never come, and because it never notices a client that went silent:

- another version than 3.1.1 is refused as MQTT 3.1.1, section 3.1.2.2, says, so that clients can fall back;
- a link without CONNECT within 10 s, or silent for 1.5 times its keep-alive, is closed, and its will is published;
- a CONNECT above 128 KiB, or any packet above what Mosquitto is allowed (`base.MAX_PACKET_BYTES`), is not read;
- with client certificates, the client id, which has to be the user name, must be the certificate's common name.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
import sys
from typing import Any

from amqtt.adapters import StreamReaderAdapter, StreamWriterAdapter
from amqtt.broker import Broker as AmqttBroker

from . import amqtt_rights
from .base import MAX_PACKET_BYTES
from .credentials import Credentials

__all__ = ["main"]

_log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 10.0
_MAX_CONNECT_BYTES = 128 << 10
_CONNECT = 0x10
_REFUSED_VERSION = b"\x20\x02\x00\x01"
_REFUSED_IDENTITY = b"\x20\x02\x00\x05"
_LEVEL_3_1_1 = 4
_LISTENER = "default"


class _Refused(Exception):  # noqa: N818 (a way out, not an error)
    """The client is told, or not worth telling, why it is cut off."""


class _TooLong(Exception):  # noqa: N818 (as above)
    """A packet that is not read; amqtt ends a link whose reading fails in a way that it does not know."""


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
        if n > MAX_PACKET_BYTES:
            raise _TooLong  # After an end of the stream amqtt would read on, and take the payload for packets.
        try:
            data = await asyncio.wait_for(super().read(n), self._silence_s)
        except asyncio.TimeoutError:
            raise asyncio.IncompleteReadError(b"", n) from None  # what amqtt takes for a lost link
        return bytes(data)


async def _read_connect(reader: asyncio.StreamReader) -> tuple[bytes, int, str]:
    """Read the first packet.

    Returns:
        The packet, with its keep-alive set to 0, its keep-alive in seconds, and the client id.
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
    packet = header + body[: keepalive.start] + b"\0\0" + body[keepalive.stop :]
    return packet, int.from_bytes(body[keepalive], "big"), _client_id(body, name_end)


def _client_id(packet: bytes, name_end: int) -> str:
    """The first field of the payload (MQTT 3.1.1, section 3.1.3)."""
    start = name_end + 6
    length = int.from_bytes(packet[start - 2 : start], "big")
    return packet[start : start + length].decode("utf-8", "replace")


class _Listener:
    """Lets connections through to the broker."""

    def __init__(self, broker: AmqttBroker, certificates: bool) -> None:
        self._broker = broker
        self._certificates = certificates
        self._links: dict[str, set[asyncio.StreamWriter]] = {}

    def cut(self, credentials: Credentials) -> None:
        """End the links of those who have no login any more."""
        for name in [name for name in self._links if not credentials.knows(name)]:
            for writer in self._links[name]:
                writer.transport.abort()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        name = ""
        try:
            packet, keepalive_s, name = await asyncio.wait_for(_read_connect(reader), _CONNECT_TIMEOUT_S)
            if self._certificates and _common_name(writer) != name:
                raise _Refused(_REFUSED_IDENTITY)
            self._links.setdefault(name, set()).add(writer)
            timed = _TimedReader(reader, packet, 1.5 * keepalive_s if keepalive_s else None)
            await self._broker.external_connected(timed, StreamWriterAdapter(writer), _LISTENER)
        except _Refused as refused:
            writer.write(b"".join(refused.args))
            with contextlib.suppress(OSError):
                await writer.drain()
        except (OSError, EOFError, asyncio.TimeoutError):
            pass  # gone, or never spoke
        except Exception:  # noqa: BLE001 (one connection must not end the broker)
            _log.exception("a connection failed")
        finally:
            self._forget(name, writer)
            writer.close()

    def _forget(self, name: str, writer: asyncio.StreamWriter) -> None:
        links = self._links.get(name, set())
        links.discard(writer)
        if not links:
            self._links.pop(name, None)


def _common_name(writer: asyncio.StreamWriter) -> str | None:
    certificate = writer.get_extra_info("peercert") or {}
    names = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    return names[0] if len(names) == 1 else None


def _context(files: dict[str, str]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(files["certificate"], files["key"])
    if files["ca"]:
        context.load_verify_locations(files["ca"])
        context.verify_mode = ssl.CERT_REQUIRED
    if files["revoked"]:
        context.load_verify_locations(files["revoked"])
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


class _Door:
    """Where clients connect: opened again, with the TLS files as they are then, without a moment at which it is shut.

    A context is not changed but replaced. It would keep the old list beside the new one, and take clients that come
    back with a ticket of it without looking at their certificates.
    """

    def __init__(self, listener: _Listener, sockets: list[socket.socket], files: dict[str, str] | None) -> None:
        self._listener, self._sockets, self._files = listener, sockets, files
        self._servers: list[asyncio.Server] = []

    async def open(self) -> None:
        """Take connections."""
        context = _context(self._files) if self._files else None
        before, accept = self._servers, self._listener.accept
        self._servers = [await asyncio.start_server(accept, sock=s.dup(), ssl=context) for s in self._sockets]
        for server in before:
            server.close()

    async def open_again(self) -> None:
        """After a change of the files; those that cannot be read leave everything as it is."""
        try:
            if self._files:
                await self.open()
        except OSError as error:  # ssl.SSLError is one
            _log.error("the changed TLS files are not in force: %s", error)


async def _serve(host: str, port: int, settings: dict[str, Any]) -> None:
    amqtt_rights.CREDENTIALS = _credentials(settings)
    plugins: dict[str, Any] = {f"{amqtt_rights.__name__}.LoginPlugin": {}}
    if amqtt_rights.CREDENTIALS is not None:
        plugins[f"{amqtt_rights.__name__}.TopicPlugin"] = {}
    broker = AmqttBroker({"listeners": {_LISTENER: {"type": "external"}}, "plugins": plugins})
    await broker.start()
    files = settings["tls"]
    listener = _Listener(broker, bool(files and files["ca"]))
    door = _Door(listener, _bind(host, port), files)
    await door.open()
    # The input ends when the parent is gone, on every system.
    while line := await asyncio.to_thread(sys.stdin.buffer.readline):
        amqtt_rights.CREDENTIALS = _credentials(json.loads(line))
        await door.open_again()
        if amqtt_rights.CREDENTIALS is not None:
            listener.cut(amqtt_rights.CREDENTIALS)


def _bind(host: str, port: int) -> list[socket.socket]:
    """One socket for each address of the host."""
    found = dict.fromkeys((i[0], i[4]) for i in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    return [socket.create_server(address[:2], family=family) for family, address in found]


def _credentials(settings: dict[str, Any]) -> Credentials | None:
    document = settings["credentials"]
    return None if document is None else Credentials.from_document(document)


def main() -> None:
    """Serve until standard input ends."""
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(name)s: %(message)s")
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), json.loads(sys.stdin.buffer.readline())))


if __name__ == "__main__":
    main()

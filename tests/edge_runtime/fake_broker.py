"""A broker that does, connection by connection, exactly what a test tells it to, however wrong."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CONNECT", "PINGREQ", "PUBACK", "PUBLISH", "SUBSCRIBE", "FakeBroker", "FakeLink", "accept", "serve"]

CONNECT, PUBLISH, PUBACK, SUBSCRIBE, PINGREQ, DISCONNECT = 1, 3, 4, 8, 12, 14


class FakeLink:
    """The broker's end of one connection."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self.level = 0  # protocol level of CONNECT: 4 is 3.1.1, 5 is 5

    def read(self) -> tuple[int, int, bytes]:
        """Packet type, flags, body. Raises EOFError when the client is gone."""
        first = self._exactly(1)[0]
        length, shift = 0, 0
        while True:
            byte = self._exactly(1)[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        return first >> 4, first & 0xF, self._exactly(length)

    def send(self, data: bytes) -> None:
        self._link.sendall(data)

    def connack(self, code: int = 0, properties: bytes = b"", session_present: bool = False) -> None:
        body = bytes([session_present, code])
        if self.level == 5:
            body += bytes([len(properties)]) + properties
        self.send(bytes([0x20, len(body)]) + body)

    def suback(self, packet: bytes, code: int = 1) -> None:
        """Answer the body of a SUBSCRIBE; ``code`` goes for each of its filters."""
        position, filters = 2 + (1 if self.level == 5 else 0), 0
        while position < len(packet):
            position += 2 + int.from_bytes(packet[position : position + 2], "big") + 1
            filters += 1
        body = packet[:2] + (b"\0" if self.level == 5 else b"") + bytes([code]) * filters
        self.send(bytes([0x90, len(body)]) + body)

    def publish(self, topic: str, payload: bytes, mid: int) -> None:
        body = len(topic).to_bytes(2, "big") + topic.encode() + mid.to_bytes(2, "big")
        body += (b"\0" if self.level == 5 else b"") + payload
        assert len(body) < 128
        self.send(bytes([0x32, len(body)]) + body)

    def puback(self, mid: bytes, code: int = 0) -> None:
        self.send(b"\x40\x02" + mid if code == 0 else b"\x40\x03" + mid + bytes([code]))

    def cut(self) -> None:
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self._link.close()

    def wait_for_end(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self.read()

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._link.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data


Script = Callable[[FakeLink], None]


class FakeBroker:
    """Runs the first script for the first connection and so on; the last one goes on for all further ones."""

    def __init__(self, *scripts: Script) -> None:
        self._scripts = scripts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._links: list[FakeLink] = []
        self.levels: list[int] = []
        self.errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for link in self._links:
            link.cut()
        self._thread.join(5)
        assert not self.errors, self.errors

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.settimeout(20)
            link = FakeLink(connection)
            self._links.append(link)
            script = self._scripts[min(len(self._links), len(self._scripts)) - 1]
            threading.Thread(target=self._follow, args=(link, script), daemon=True).start()

    def _follow(self, link: FakeLink, script: Script) -> None:
        try:
            kind, _, body = link.read()
            assert kind == CONNECT
            link.level = body[6]
            self.levels.append(link.level)
            script(link)
        except (EOFError, OSError):
            pass
        except BaseException as error:  # noqa: BLE001 (shown by __exit__)
            self.errors.append(error)
        finally:
            link.cut()


def accept(link: FakeLink) -> None:
    """Behave: accept, grant, acknowledge."""
    link.connack()
    serve(link)


def serve(link: FakeLink) -> None:
    """Grant subscriptions, acknowledge publishes, answer pings."""
    while True:
        kind, flags, body = link.read()
        if kind == SUBSCRIBE:
            link.suback(body)
        elif kind == PUBLISH and flags & 6:
            size = int.from_bytes(body[:2], "big")
            link.puback(body[2 + size : 4 + size])
        elif kind == PINGREQ:
            link.send(b"\xd0\0")
        elif kind == DISCONNECT:
            return

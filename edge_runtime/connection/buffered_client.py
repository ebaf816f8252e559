"""paho's client with buffers between it and the socket: one system call for many packets.

paho reads a packet in three or four calls and writes each in one. Every call gives up Python's global lock, and a busy
server waits for it each time. Packets that are written together also share an IP packet, whose headers are 52 bytes.

What paho itself would collect without end has a limit here: answers to a peer that sends and does not read, and
messages of QoS 2, which are kept until they are released. Nobody subscribes at QoS 2, so they end the link.
"""

from __future__ import annotations

from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.enums import MQTTErrorCode

__all__ = ["BufferedClient"]

_READ_BYTES = 32 << 10
_WRITE_BYTES = 64 << 10
_DISCONNECT = 0xE0
_ANSWERS = frozenset({0x40, 0x50, 0x70, 0xD0})  # PUBACK, PUBREC, PUBCOMP, PINGRESP
_MAX_ANSWERS = 1000
_MAX_WAITING = 1000
_QOS_2, _QOS_2_MASK = 0x34, 0xF4  # PUBLISH with the upper bit of its QoS


class BufferedClient(Client):
    """Not thread-safe: whoever drives the client calls :meth:`refill` before it reads and :meth:`flush` at the end.

    Attributes:
        has_ended: Whether the network has ended the link.
        error: What it said then; None if the other side has just closed it.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._received, self._place, self._may_receive = b"", 0, False
        self._unsent, self._answers = bytearray(), 0
        self.has_ended = False
        self.error: OSError | None = None
        super().__init__(*arguments, **options)

    def refill(self) -> None:
        """Allow one read of the socket: what arrives meanwhile has to wait until writing had its turn."""
        self._may_receive = True

    @property
    def has_unread(self) -> bool:
        """Whether bytes of the last read are left."""
        return self._place < len(self._received)

    @property
    def has_unsent(self) -> bool:
        """Whether something is left to be written."""
        return bool(self._unsent) or self.want_write()

    @property
    def is_clogged(self) -> bool:
        """Whether so many answers wait behind the buffer that nothing should be read that asks for more."""
        return self._answers >= _MAX_ANSWERS

    def is_behind(self) -> bool:
        """Whether so many packets wait that those of somebody who has a queue of his own should stay there."""
        return len(self._out_packet) >= _MAX_WAITING

    def flush(self) -> None:
        """Write what was collected, as far as the socket takes it.

        Raises:
            OSError: The link is broken.
        """
        try:
            while self._unsent:
                del self._unsent[: super()._sock_send(self._unsent)]
        except BlockingIOError:
            pass

    def _sock_recv(self, bufsize: int) -> bytes:
        """What is left of the last read, or a new one."""
        if not self.has_unread:
            if not self._may_receive:
                raise BlockingIOError
            self._may_receive = False
            self._received, self._place = self._read(max(bufsize, _READ_BYTES)), 0
        part = self._received[self._place : self._place + bufsize]
        self._place += len(part)
        if not self.has_unread:
            self._received, self._place = b"", 0
        return part

    def _read(self, size: int) -> bytes:
        """One read of the socket; how the link ended is kept, as paho tells nobody."""
        try:
            received = super()._sock_recv(size)
        except BlockingIOError:
            raise
        except OSError as error:
            self.has_ended, self.error = True, error
            raise
        self.has_ended = not received
        return received

    def _sock_send(self, buf: bytes | bytearray) -> int:
        """Collect; always whole packets. After a DISCONNECT paho closes the socket, so that it is written at once."""
        if len(self._unsent) >= _WRITE_BYTES or buf[0] == _DISCONNECT:
            self.flush()
            if self._unsent:
                raise BlockingIOError
        if buf[0] == _DISCONNECT:
            return super()._sock_send(buf)
        self._unsent += buf
        self._answers -= buf[0] & 0xF0 in _ANSWERS
        return len(buf)

    def _packet_queue(self, command: int, *arguments: Any, **options: Any) -> MQTTErrorCode:
        self._answers += command & 0xF0 in _ANSWERS
        return super()._packet_queue(command, *arguments, **options)

    def _packet_handle(self) -> MQTTErrorCode:
        if self._in_packet["command"] & _QOS_2_MASK == _QOS_2:
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        return super()._packet_handle()

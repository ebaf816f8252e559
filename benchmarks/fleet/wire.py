"""A cable of one's own: a network namespace behind a virtual Ethernet link, and every packet that passes it.

Ethernet's own limits hold on it: packets of at most 1,500 bytes, no offloading, so that what is counted is what a
network card would send.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Cable", "Capture", "Packet", "can_capture", "without_offload"]

_EVERYTHING, _IP, _TCP = 0x0003, 0x0800, 6  # only a socket for everything sees what this machine sends
_SIOCETHTOOL = 0x8946
_ETHTOOL_STXCSUM, _ETHTOOL_STSO, _ETHTOOL_SGSO, _ETHTOOL_SGRO = 0x17, 0x1F, 0x24, 0x2C


class Packet(NamedTuple):
    """One IP packet.

    Attributes:
        at: When it passed, by ``time.time``.
        up: Whether it went from the device to the broker.
        size: Bytes at IP level: headers of IP and TCP, and what they carry.
        carried: Bytes that TCP carries.
    """

    at: float
    up: bool
    size: int
    carried: int


def can_capture() -> bool:
    """Whether this process may make network namespaces and see packets: it takes root on Linux."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return False
    try:
        with Cable():
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def without_offload(interface: str) -> None:
    """Let an interface send and hand on packets as they are on a wire (ethtool(8): tso, gso, gro off).

    Raises:
        OSError: It cannot.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for command in (_ETHTOOL_SGRO, _ETHTOOL_STSO, _ETHTOOL_SGSO, _ETHTOOL_STXCSUM):
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP", interface.encode(), ctypes.addressof(value))
            fcntl.ioctl(any_socket, _SIOCETHTOOL, request)


class Cable:
    """A virtual Ethernet link into a namespace; both are gone with the context.

    Attributes:
        interface: This end of it.
        address: Of this end.
    """

    def __init__(self) -> None:
        number = os.getpid() % 100_000
        # Of its own: one that was left behind by a process that was killed must not answer in its place.
        network = f"169.254.{1 + number // 63 % 254}.{4 * (1 + number % 63)}"
        place, _, last = network.rpartition(".")
        self.address, self._other = f"{place}.{int(last) + 1}", f"{place}.{int(last) + 2}"
        self.interface, self._far, self._name = f"fzh{number}", f"fzd{number}", f"fedzo-wire-{number}"

    def command(self, program: Sequence[object]) -> list[str]:
        """What runs a program at the far end."""
        return ["ip", "netns", "exec", self._name, *(str(part) for part in program)]

    def __enter__(self) -> Self:
        try:
            _ip("netns", "add", self._name)
            _ip("link", "add", self.interface, "type", "veth", "peer", "name", self._far)
            _ip("link", "set", self._far, "netns", self._name)
            _ip("addr", "add", f"{self.address}/30", "dev", self.interface)
            _ip("link", "set", self.interface, "up")
            for step in (["addr", "add", f"{self._other}/30", "dev", self._far], ["link", "set", self._far, "up"]):
                subprocess.run(self.command(["ip", *step]), check=True, capture_output=True)
            without_offload(self.interface)
            module = "from benchmarks.fleet.wire import without_offload"
            program = [sys.executable, "-c", f"{module}; without_offload({self._far!r})"]
            subprocess.run(self.command(program), check=True, capture_output=True)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for arguments in (["link", "del", self.interface], ["netns", "del", self._name]):
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                _ip(*arguments)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Capture:
    """Every TCP packet at one end of a cable from or to one port, while the context lasts.

    Args:
        interface: Where.
        port: Of the broker, at this end.
    """

    def __init__(self, interface: str, port: int) -> None:
        self._port = port
        self.packets: list[Packet] = []
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_EVERYTHING))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
        self._socket.bind((interface, _EVERYTHING))
        self._socket.settimeout(0.1)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        time.sleep(0.3)
        self._over.set()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                data, address = self._socket.recvfrom(1 << 16)
            except TimeoutError:
                continue
            if address[1] == _IP:
                self._take(data, outgoing=address[2] == socket.PACKET_OUTGOING)

    def _take(self, data: bytes, *, outgoing: bool) -> None:
        """One packet: RFC 791 and RFC 9293, section 3.1."""
        header = (data[0] & 15) * 4
        if data[9] != _TCP:
            return
        source, target = struct.unpack_from("!HH", data, header)
        if self._port not in (source, target):
            return
        size = struct.unpack_from("!H", data, 2)[0]
        carried = size - header - (data[header + 12] >> 4) * 4
        self.packets.append(Packet(time.time(), not outgoing, size, carried))

    def between(self, first: float, last: float) -> Iterator[Packet]:
        """Packets of a while."""
        return (packet for packet in self.packets if first <= packet.at < last)

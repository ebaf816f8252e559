"""The broker in memory: real payloads, counted as MQTT packets, on links that may take virtual time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..edge_runtime.connection.inbound import read_message
from ..edge_runtime.connection.traffic import publish_packet_bytes
from ..protocol.device_side.device_events import Received
from ..protocol.server_side.coordinator_events import DeviceSaid
from ..protocol.wire.codec import BinaryMessage, decode
from ..protocol.wire.documents import Document, Hello, Presence, parse
from ..protocol.wire.topics import RETAINED, Channel, topic
from .clock import Clock

if TYPE_CHECKING:
    from .virtual_device import VirtualDevice
    from .virtual_server import VirtualServer

__all__ = ["Link", "Wires"]

_FEDERATION = "simulation"
_DOCUMENTS: dict[Channel, type[Hello | Presence]] = {Channel.HELLO: Hello, Channel.STATE: Presence}


class Link:
    """One direction of a device's link: messages follow each other.

    Attributes:
        bytes: Sent so far.
    """

    def __init__(self, bytes_per_s: float, latency_s: float) -> None:
        self._bytes_per_s, self._latency_s = bytes_per_s, latency_s
        self._free = 0.0
        self.bytes = 0

    def arrival(self, now: float, n_bytes: int) -> float:
        """When a message that is sent now has arrived."""
        self.bytes += n_bytes
        if self._bytes_per_s:
            self._free = max(self._free, now) + n_bytes / self._bytes_per_s
            return self._free + self._latency_s
        return now + self._latency_s


class Wires:
    """Carries messages between the server and the devices.

    What a device is sent while it is away is lost, but for what is retained: it gets that when it is back.

    Args:
        clock: Virtual time.

    Attributes:
        server: Set by whoever builds both ends.
        devices: Likewise.
        is_training: Whether what is sent counts as training.
        training_up: Bytes that devices sent in training.
        training_down: Bytes that devices were sent in training.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._retained: dict[Channel, tuple[Received, int]] = {}
        self._sizes: dict[tuple[Channel, str], str] = {}
        self.server: VirtualServer
        self.devices: list[VirtualDevice] = []
        self._by_name: dict[str, VirtualDevice] = {}
        self.is_training = False
        self.training_up = self.training_down = 0

    def attach(self, device: VirtualDevice) -> None:
        """Plug a device in."""
        self.devices.append(device)
        self._by_name[device.name] = device

    def to_devices(self, channel: Channel, message: Document | BinaryMessage, name: str) -> None:
        """The server publishes; without a name for everybody."""
        payload, where = message.encode(), self._topic(channel, name)
        received = read_message(_FEDERATION, name, where, payload)  # once: nobody changes it
        size = publish_packet_bytes(where, len(payload), 1, 0)
        if channel in RETAINED:
            self._retained[channel] = (received, size)
        counts = self.is_training or channel is Channel.LOG
        for device in [self._by_name[name]] if name else self.devices:
            if device.online:
                self._deliver(device, received, size)
                self.training_down += size if counts else 0

    def welcome(self, device: VirtualDevice) -> None:
        """A device has subscribed: it gets what is retained."""
        for channel in (Channel.SERVER, Channel.RUN, Channel.HEAD):
            if channel in self._retained:
                self._deliver(device, *self._retained[channel])

    def to_server(self, device: VirtualDevice, channel: Channel, message: Document | BinaryMessage) -> None:
        """A device publishes."""
        payload = message.encode()
        size = publish_packet_bytes(self._topic(channel, device.name), len(payload), 1, 0)
        self.training_up += size if self.is_training else 0
        self._clock.at(device.up.arrival(self._clock.now, size), self._arrive, device.name, channel, payload)

    def will(self, device: VirtualDevice, presence: Presence) -> None:
        """The broker says that a device is lost."""
        self._clock.at(self._clock.now, self._arrive, device.name, Channel.STATE, presence.encode())

    def _deliver(self, device: VirtualDevice, received: Received, size: int) -> None:
        self._clock.at(device.down.arrival(self._clock.now, size), device.receive, received)

    def _arrive(self, name: str, channel: Channel, payload: bytes) -> None:
        kind = _DOCUMENTS.get(channel)
        message = decode(payload) if kind is None else parse(kind, payload)
        self.server.on(DeviceSaid(name, channel, message))

    def _topic(self, channel: Channel, name: str) -> str:
        key = (channel, name)
        if key not in self._sizes:
            self._sizes[key] = topic(_FEDERATION, channel, name)
        return self._sizes[key]

"""MQTT topics of a federation: who writes what where.

======================  ======  ===================================================
topic below the prefix  writer  content
======================  ======  ===================================================
``srv``                 server  retained, will: is the server there
``run``                 server  retained JSON: the run's settings
``head``                server  retained JSON: the open round
``log``                 server  update records as they are made
``d/DEV/hello``         device  JSON: who I am
``d/DEV/state``         device  retained JSON, will: how I am
``d/DEV/report``        device  scalars of a round
``d/DEV/get``           device  asks for blocks of blobs and for log records
``s/DEV/ack``           server  receipt of a report
``s/DEV/block``         server  what the device asked for
``s/DEV/cmd``           server  JSON: welcome, refusal, stop
======================  ======  ===================================================

The prefix is ``fedzo/v1/FEDERATION/``. Only MQTT 3.1.1 semantics are used: QoS 1, retained messages on exact topics,
wills. Devices never read each other.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from ..errors import ConfigError, ProtocolError

__all__ = ["Channel", "Topic", "check_name", "device_subscriptions", "parse_topic", "server_subscriptions", "topic"]

_NAME = re.compile(r"[a-z0-9-]{1,48}")
_PREFIX = "fedzo/v1"


class Channel(enum.Enum):
    """A kind of topic; the value is its last level."""

    SERVER = "srv"
    RUN = "run"
    HEAD = "head"
    LOG = "log"
    HELLO = "hello"
    STATE = "state"
    REPORT = "report"
    GET = "get"
    ACK = "ack"
    BLOCK = "block"
    COMMAND = "cmd"


BROADCAST = (Channel.SERVER, Channel.RUN, Channel.HEAD, Channel.LOG)
FROM_DEVICE = (Channel.HELLO, Channel.STATE, Channel.REPORT, Channel.GET)
TO_DEVICE = (Channel.ACK, Channel.BLOCK, Channel.COMMAND)
RETAINED = (Channel.SERVER, Channel.RUN, Channel.HEAD, Channel.STATE)


@dataclass(frozen=True, slots=True)
class Topic:
    """A parsed topic.

    Attributes:
        federation: Its federation.
        channel: What it carries.
        device: The device it belongs to; empty on broadcast channels.
    """

    federation: str
    channel: Channel
    device: str = ""


def check_name(what: str, name: str) -> str:
    """Return ``name`` if it can be a topic level, a client id and a file name.

    Raises:
        ConfigError: It does not match ``[a-z0-9-]{1,48}``.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{what} {name[:60]!r} is not a valid name",
            hint="use 1 to 48 of the characters a-z, 0-9 and -",
        )
    return name


def topic(federation: str, channel: Channel, device: str = "") -> str:
    """The topic text of a channel.

    Raises:
        ConfigError: A name is invalid, or missing where one is needed.
    """
    prefix = f"{_PREFIX}/{check_name('federation', federation)}"
    if channel in BROADCAST:
        return f"{prefix}/{channel.value}"
    side = "d" if channel in FROM_DEVICE else "s"
    return f"{prefix}/{side}/{check_name('device', device)}/{channel.value}"


def parse_topic(text: str) -> Topic:
    """Inverse of :func:`topic`.

    Raises:
        ProtocolError: It is no topic of this protocol.
    """
    levels = text.split("/")
    try:
        if levels[:2] == _PREFIX.split("/") and len(levels) in (4, 6) and _NAME.fullmatch(levels[2]):
            channel = Channel(levels[-1])
            if len(levels) == 4 and channel in BROADCAST:
                return Topic(levels[2], channel)
            side = FROM_DEVICE if levels[3] == "d" else TO_DEVICE if levels[3] == "s" else ()
            if len(levels) == 6 and channel in side and _NAME.fullmatch(levels[4]):
                return Topic(levels[2], channel, levels[4])
    except ValueError:
        pass
    raise ProtocolError(f"{text[:80]!r} is not a topic of this protocol")


def device_subscriptions(federation: str, device: str) -> tuple[str, ...]:
    """Everything that a device listens to; exact topics only."""
    broadcast = tuple(topic(federation, channel) for channel in BROADCAST)
    return broadcast + tuple(topic(federation, channel, device) for channel in TO_DEVICE)


def server_subscriptions(federation: str) -> tuple[str, ...]:
    """Everything that a server listens to."""
    check_name("federation", federation)
    return tuple(f"{_PREFIX}/{federation}/d/+/{channel.value}" for channel in FROM_DEVICE)

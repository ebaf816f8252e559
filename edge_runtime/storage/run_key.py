"""The key that a board trusts its runs to be signed with: given, or that of the first run, and no other ever after.

The first run is the first one whose server answers this process, with an order for its session that the run's key has
signed. A broker keeps the documents of runs that are over; their keys are only tried.

The pin lies in the state folder, so it holds over restarts. Whoever runs the broker, or stands between it and the
board, can then delay or drop what the server says, but not change it: artifact, settings, mask, announced rounds and
orders, see ``protocol/wire/signed.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from ...protocol.errors import ArtifactError, ConfigError, ProtocolError
from ...protocol.wire.documents import Order, parse
from ...protocol.wire.ed25519 import is_public_key, verify
from ...protocol.wire.signed import check, detach, is_signed, signed_bytes
from ...protocol.wire.topics import Channel, parse_topic
from ..connection.mqtt_types import Arrived
from .durable import write_durably

__all__ = ["RunKey", "parse_run_key"]

_log = logging.getLogger(__name__)
_MAX_PIN_BYTES = 256


def parse_run_key(text: str) -> bytes:
    """A public key as ``fedzo serve`` prints it.

    Raises:
        ConfigError: It is none.
    """
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if not is_public_key(key):
        raise ConfigError(
            f"the run key {text.strip()[:80]!r} is no public key",
            hint="64 hex digits, as fedzo serve and fedzo credentials list print them",
        )
    return key


class RunKey:
    """Opens what the server has signed.

    Args:
        path: File of the pin; it need not exist.
        federation: Name of the federation.
        device: The device id.
        session: Its boot counter, which an answer names; no two starts have the same.
        given: A key to trust instead of the pinned one; it becomes the pin.
        say: Takes one line for people when a key is trusted for the first time.

    Raises:
        ConfigError: The pin is damaged or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        federation: str,
        device: str,
        session: int,
        *,
        given: bytes | None = None,
        say: Callable[[str], None] = _log.info,
    ) -> None:
        self._path, self._federation, self._device, self._say = path, federation, device, say
        self._session = session
        self._key = self._pinned()
        self._tried: bytes | None = None  # of a run that nobody has answered for yet
        self._is_proven = False
        self._early: Arrived | None = None
        self._latest: dict[Channel, bytes] = {}
        if given is not None and given != self._key:
            self._pin(given)

    @property
    def key(self) -> bytes | None:
        """The trusted key, 32 bytes; None before a server has answered."""
        return self._key

    def open(self, arrived: Arrived) -> bytes | None:
        """The payload without its signature, which is good; None if it has to wait, see :meth:`early`.

        Raises:
            ProtocolError: It is not signed, or not by the trusted key.
            ArtifactError: The first run that this process hears of is signed by another key than the trusted one.
            ConfigError: The key cannot be pinned.
        """
        place, payload = parse_topic(arrived.topic), arrived.payload
        if not is_signed(place.channel, payload):
            return payload
        if self._latest.get(place.channel) == payload:
            return detach(place.channel, payload)[0]
        if place.channel is Channel.RUN:
            document = self._open_run(payload)
        elif self._key is None:
            if place.channel is Channel.HEAD:
                self._early = arrived
            if place.channel is not Channel.COMMAND or self._tried is None:
                return None
            document = self._open_answer(payload, self._tried)
        else:
            device = self._device if place.device else ""  # Signed for another one, it is not signed for this one.
            document = check(self._federation, place.channel, device, payload, self._key)
        self._latest[place.channel] = payload
        return document

    def early(self) -> Arrived | None:
        """An announcement that came before there was a trusted key, once there is one; once."""
        if self._key is None or self._early is None:
            return None
        arrived, self._early = self._early, None
        return arrived

    def _open_run(self, payload: bytes) -> bytes:
        document, key, signature = detach(Channel.RUN, payload)
        if not verify(key, signed_bytes(self._federation, Channel.RUN, "", document), signature):
            raise ProtocolError("the run's document is not signed")
        if self._key is None:
            self._tried = key
            self._latest.clear()  # What another key has signed is no repetition.
            return document
        if key != self._key:
            if self._is_proven:
                raise ProtocolError(f"a run's document is signed with another key, {key.hex()}")
            raise ArtifactError(
                f"the run is signed with the key {key.hex()}, this device trusts {self._key.hex()} only",
                hint=f"if the server's key was replaced on purpose, join once with --run-key {key.hex()}; "
                "else somebody else serves under the server's address",
            )
        self._is_proven = True
        return document

    def _open_answer(self, payload: bytes, tried: bytes) -> bytes:
        """An order, which makes the key of the run that it came for the trusted one if it answers this session."""
        document = check(self._federation, Channel.COMMAND, self._device, payload, tried)
        if parse(Order, document).session == self._session:
            self._pin(tried)
            self._is_proven = True
            self._say(f"from now on runs must be signed with the key of this one, {tried.hex()}")
        return document

    def _pinned(self) -> bytes | None:
        try:
            with self._path.open("r", encoding="ascii", errors="replace") as file:
                text = file.read(_MAX_PIN_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"cannot read the trusted key {self._path}: {error.strerror or error}") from None
        try:
            return parse_run_key(text)
        except ConfigError as error:
            raise ConfigError(
                f"{self._path}: {error.message}", hint="join with --run-key, or remove the file to trust the next run"
            ) from None

    def _pin(self, key: bytes) -> None:
        try:
            write_durably(self._path, f"{key.hex()}\n".encode())
        except OSError as error:
            raise ConfigError(f"cannot keep the run's key in {self._path}: {error.strerror or error}") from None
        self._key = key

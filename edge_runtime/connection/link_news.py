"""What people are told about the link of a device: once an outage, not once an attempt."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from .mqtt_types import Disconnected
from .short_links import ShortLinks

__all__ = ["LinkNews"]

_log = logging.getLogger(__name__)

LONELY_S = 5.0  # without a word of a server


class LinkNews:
    """Says what changes.

    Args:
        say: Takes one line for people.
        broker: The broker's address, without a password.
        federation: Whose server is waited for.
        device: The device's id.
    """

    def __init__(self, say: Callable[[str], None], broker: str, federation: str, device: str) -> None:
        self._say, self._broker, self._federation, self._device = say, broker, federation, device
        self._linked: bool | None = None
        self._hint = ""
        self._short = ShortLinks()
        self._lonely_at: float | None = None
        self._is_told = False

    def connected(self) -> None:
        """There is a link."""
        self._say(f"{'connected again' if self._linked is False else 'connected'} to {self._broker}")
        self._linked, self._hint = True, ""
        self._short.began()
        self._lonely_at = None if self._is_told else time.monotonic() + LONELY_S

    def disconnected(self, event: Disconnected) -> None:
        """The link is lost, or one more attempt failed; what could be done about it is said when it is new."""
        if self._linked is not False or (event.refused and event.hint != self._hint):
            self._say(f"no link to {self._broker} ({event.reason}); trying again")
            if event.hint:
                self._say(f"hint: {event.hint}")
        if self._short.ended():
            _log.warning("the link breaks again and again: has another device the id %s?", self._device)
        self._hint = event.hint if event.refused else self._hint
        self._linked, self._lonely_at = False, None

    def heard_of_server(self, *, online: bool) -> None:
        """A server came or went."""
        if online:
            self._lonely_at, self._is_told = None, True

    @property
    def wait_s(self) -> float | None:
        """When :meth:`look` has something to say."""
        return None if self._lonely_at is None else max(0.0, self._lonely_at - time.monotonic())

    def look(self) -> None:
        """Say, once, that there is no server so far."""
        if self._lonely_at is not None and time.monotonic() >= self._lonely_at:
            self._lonely_at, self._is_told = None, True
            self._say(f"no server of federation {self._federation!r} is there yet; waiting")

"""Signs of life to systemd: sd_notify(3) without its library, and nothing at all where no service manager listens."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping

__all__ = ["ServiceManager"]

_log = logging.getLogger(__name__)

FEEDS_PER_TIMEOUT = 4


class ServiceManager:
    """Whoever started this process and wants to hear from it; see sd_notify(3) and sd_watchdog_enabled(3).

    Args:
        environ: ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID``; by default those of this process.
        clock: Seconds, for tests.

    Attributes:
        interval_s: How often :meth:`feed` must be called; None without a watchdog.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.monotonic) -> None:
        path = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path  # @ is an abstract socket
        self._clock, self._fed = clock, -float("inf")
        self.interval_s: float | None = None
        timeout, process = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
        if path and timeout.isdecimal() and int(timeout) and process in ("", str(os.getpid())):
            self.interval_s = int(timeout) / 1e6 / FEEDS_PER_TIMEOUT

    def ready(self) -> None:
        """The service has started."""
        self._send("READY=1")

    def stopping(self) -> None:
        """The service is about to end by itself."""
        self._send("STOPPING=1")

    def feed(self) -> None:
        """Tell the watchdog that the caller's loop turns; cheap when it was told a moment ago."""
        if self.interval_s is not None and self._clock() - self._fed >= self.interval_s * 0.9:
            self._fed = self._clock()
            self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
                manager.settimeout(1.0)
                manager.connect(self._address)
                manager.sendall(state.encode())
        except OSError as error:
            _log.debug("the service manager did not take %s: %s", state, error)

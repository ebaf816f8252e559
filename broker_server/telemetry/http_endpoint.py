"""The server's small HTTP endpoint: ``/metrics``, ``/healthz`` and ``/readyz``, read only.

It stands beside the run and can not hold it up: a few connections at a time, one request each, a time limit for all of
it. There is no password, so it belongs on loopback or into a network of trust.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ...protocol.errors import ConfigError
from .health import Check, Health

if TYPE_CHECKING:
    from typing_extensions import Self  # typing.Self came with Python 3.11

__all__ = ["HttpEndpoint", "is_loopback", "parse_address"]

_log = logging.getLogger(__name__)

DEFAULT_HOST = "127.0.0.1"
MAX_CONNECTIONS = 8
REQUEST_S = 10.0  # for a whole connection, however slowly its bytes come
MAX_PORT = 65_535
_PLAIN = "text/plain; charset=utf-8"


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT``, ``[ADDRESS]:PORT`` or ``PORT``, which listens on loopback.

    Raises:
        ConfigError: It is none of these.
    """
    host, separator, port = text.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not port.isascii() or not port.isdecimal() or int(port) > MAX_PORT or (separator and not host):
        raise ConfigError(f"{text!r} is no address to listen on", hint="give HOST:PORT, such as 127.0.0.1:9464")
    return host or DEFAULT_HOST, int(port)


def is_loopback(url: str) -> bool:
    """Whether only this machine reaches an endpoint."""
    return url.startswith(("http://127.", "http://[::1]:"))


class HttpEndpoint:
    """Serves on threads of its own from ``start`` to ``stop``; a context manager.

    Args:
        address: Host and port; port 0 takes a free one.
        health: Answers ``/healthz`` and ``/readyz``.
        metrics: Gives the body of ``/metrics`` and its content type for an ``Accept`` header; None without metrics.

    Raises:
        ConfigError: The address cannot be listened on.
    """

    def __init__(
        self,
        address: tuple[str, int],
        health: Health,
        metrics: Callable[[str], tuple[bytes, str]] | None = None,
    ) -> None:
        try:
            self._server = _Server(address, health, metrics)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {address[0]}:{address[1]} for metrics: {error.strerror or error}",
                hint="choose another --metrics HOST:PORT",
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.25,), name="fedzo-http", daemon=True)

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._server.server_address[:2]
        host = host.decode() if isinstance(host, bytes) else host
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Close the port and all connections."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _Server(HTTPServer):
    """One thread a connection, a few at a time; whoever is slow is cut off."""

    allow_reuse_address = True
    request_queue_size = 16

    def __init__(
        self, address: tuple[str, int], health: Health, metrics: Callable[[str], tuple[bytes, str]] | None
    ) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.health, self.metrics = health, metrics
        self._open: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Without the name look-up of the base class, which may take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer on a thread, or not at all while too many are open."""
        with self._lock:
            if len(self._open) >= MAX_CONNECTIONS:
                self.shutdown_request(request)
                return
            self._open[request] = time.monotonic()
        try:
            threading.Thread(target=self._answer, args=(request, client_address), daemon=True).start()
        except RuntimeError:  # no more threads
            self._end(request)

    def _answer(self, request: socket.socket, client_address: Any) -> None:
        try:
            # A peer that is gone or was cut off is no news.
            with contextlib.suppress(OSError, ValueError):
                self.finish_request(request, client_address)
        finally:
            self._end(request)

    def _end(self, request: socket.socket) -> None:
        with self._lock:
            self._open.pop(request, None)
        self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 (the name is the base class's)
        """Into the log, not onto stderr, which may be for JSON lines alone."""
        _log.warning("a request of %s failed", client_address, exc_info=True)

    def service_actions(self) -> None:
        """Called several times a second: cut off whoever has had its time."""
        now = time.monotonic()
        with self._lock:
            late = [request for request, since in self._open.items() if now - since > REQUEST_S]
        for request in late:
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def server_close(self) -> None:
        """Also the connections."""
        super().server_close()
        with self._lock:
            for request in self._open:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    """One request, then the connection is closed: HTTP/1.0 without keep-alive."""

    server: _Server
    timeout = REQUEST_S
    server_version, sys_version = "fedzo", ""

    def do_GET(self) -> None:
        """Answer with a body."""
        self._reply(*self._find())

    def do_HEAD(self) -> None:
        """Answer without one."""
        self._reply(*self._find())

    def _find(self) -> tuple[int, bytes, str]:
        path, health = self.path.partition("?")[0], self.server.health
        try:
            if path == "/metrics" and self.server.metrics is not None:
                body, content_type = self.server.metrics(self.headers.get("Accept", ""))
                return 200, body, content_type
            if path in ("/healthz", "/readyz"):
                return _checks(health.live() if path == "/healthz" else health.ready())
        except Exception as error:  # noqa: BLE001 (a bug here must show as one, and not end the thread in silence)
            return 500, f"{type(error).__name__}: {error}\n".encode(), _PLAIN
        return 404, b"there are /metrics, /healthz and /readyz\n", _PLAIN

    def _reply(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name is the base class's)
        """Requests are not logged: they come every few seconds for ever."""


def _checks(checks: list[Check]) -> tuple[int, bytes, str]:
    ok = all(check.ok for check in checks)
    body = json.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}) + "\n"
    return 200 if ok else 503, body.encode(), "application/json"

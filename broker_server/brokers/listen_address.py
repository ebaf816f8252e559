"""Where a broker of one's own listens, and how others reach it."""

from __future__ import annotations

import errno
import socket

from ...protocol.errors import BrokerError

__all__ = ["choose_port", "client_host", "own_address"]

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 (read, not bound)
_ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}  # RFC 5737, RFC 3849: nobody's


def client_host(host: str) -> str:
    """Return the address at which a client on this machine reaches a listener bound to `host`."""
    return _WILDCARDS.get(host, host)


def own_address(host: str) -> str | None:
    """Return the address at which other machines reach a listener bound to `host`, None if there is none.

    Of a wildcard it is the one that the system would send from; connecting a datagram socket sends nothing.
    """
    if host not in _WILDCARDS:
        return host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((_ELSEWHERE[family], 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def choose_port(host: str, port: int) -> int:
    """Check that a port can be bound; port 0 chooses a free one.

    Raises:
        BrokerError: The port is in use or not allowed, or the host is no address of this machine.
    """
    try:
        addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = addresses[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise _explain(error, host, port) from None


def _explain(error: OSError, host: str, port: int) -> BrokerError:
    if isinstance(error, socket.gaierror):
        return BrokerError(f"the host name {host!r} has no address: {error.strerror}", hint=_allowed())
    if error.errno == errno.EADDRNOTAVAIL:
        return BrokerError(f"{host} is no address of this machine", hint=_allowed())
    if error.errno == errno.EADDRINUSE:
        return BrokerError(
            f"port {port} on {host} is in use",
            hint=f"if a broker runs there use it with --broker mqtt://{client_host(host)}:{port}, "
            f"else stop the other program or choose another port",
        )
    hint = "use a port from 1024 up" if error.errno in (errno.EACCES, errno.EPERM) else _allowed()
    return BrokerError(f"port {port} on {host} cannot be bound: {error.strerror}", hint=hint)


def _allowed() -> str:
    found = own_address("")
    here = f"{found}, " if found else ""
    return f"use {here}127.0.0.1 for this machine alone, or 0.0.0.0 for all of its addresses"

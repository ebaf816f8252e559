"""Whether a device could reach its broker: address, certificate, credentials and the rights to its topics."""

from __future__ import annotations

import secrets
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...protocol.errors import FedzoError
from ...protocol.wire.topics import device_subscriptions
from ..installation.device_bundle import DeviceBundle
from .endpoint import Endpoint, TlsConfig, read_password
from .transport import Connected, MqttTransport, TransportEvent

__all__ = ["BrokerAccess", "address_findings", "broker_findings", "describe"]

_TCP_TIMEOUT_S: Final = 8.0
_FEW_DAYS: Final = 14.0


@dataclass(frozen=True)
class BrokerAccess:
    """What a device would connect with; see :class:`~..join.JoinSettings` for each field.

    Attributes:
        url: ``mqtt://`` or ``mqtts://``.
        federation: Whose topics are subscribed.
        device: The device id; without one, no topic is subscribed.
        username: MQTT user; the device id when there is a password and one is known.
        password_file: Its first line is the password.
        ca: Certificates that may sign the broker's.
        cert: The device's certificate.
        key: Its key.
        timeout_s: For the connection.
        bundle: Credentials folder, instead of password and files.
    """

    url: str
    federation: str = "default"
    device: str | None = None
    username: str | None = None
    password_file: Path | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    timeout_s: float = 15.0
    bundle: DeviceBundle | None = None

    def password(self) -> str | None:
        """The user's password, if there is one."""
        return self.bundle.password if self.bundle is not None else read_password(self.password_file)

    def tls(self) -> TlsConfig | None:
        """The files of a TLS connection, if there are any."""
        if self.bundle is not None:
            return self.bundle.tls
        files = self.ca or self.cert or self.key
        return TlsConfig(self.ca, self.cert, self.key) if files else None


def broker_findings(access: BrokerAccess) -> Iterator[tuple[str, str, str]]:
    """Try one step after the other.

    Yields:
        ``(name, detail, warning)`` of each step that succeeded; ``warning`` is a hint or empty.

    Raises:
        FedzoError: A step failed; the following ones were not tried.
        OSError: The address cannot be reached, or TLS fails.
    """
    yield from address_findings(access)
    yield ("broker session", *_session(access))


def address_findings(access: BrokerAccess) -> Iterator[tuple[str, str, str]]:
    """Look at address and TLS only, without a word of MQTT.

    Yields:
        As :func:`broker_findings`.

    Raises:
        ConfigError: A file cannot be used.
        OSError: The address cannot be reached, or TLS fails.
    """
    endpoint = Endpoint.parse(access.url)
    context = endpoint.tls_context(access.tls())
    password = access.password()
    started = time.monotonic()
    with socket.create_connection((endpoint.host, endpoint.port), timeout=_TCP_TIMEOUT_S) as connection:
        peer = connection.getpeername()[0]
        yield "broker address", f"{endpoint.address} is {peer}, {1e3 * (time.monotonic() - started):.0f} ms", ""
        if context is not None:
            with context.wrap_socket(connection, server_hostname=endpoint.host) as secured:
                yield ("broker TLS", *_certificate(secured))
        elif password is not None or endpoint.password is not None:
            yield "broker TLS", "none", "the password crosses the network readable: use mqtts://"


def _certificate(secured: ssl.SSLSocket) -> tuple[str, str]:
    certificate = secured.getpeercert() or {}
    expires = certificate.get("notAfter")
    days = (ssl.cert_time_to_seconds(expires) - time.time()) / 86_400 if isinstance(expires, str) else 0.0
    hint = "renew the broker's certificate" if days < _FEW_DAYS else ""
    return f"{secured.version()}, the certificate is valid for {days:.0f} days", hint


def _session(access: BrokerAccess) -> tuple[str, str]:
    username, password = access.username, access.password()
    if username is None and password is not None:
        username = access.device
    protocols: list[str] = []

    def on_event(event: TransportEvent) -> None:
        if isinstance(event, Connected):
            protocols.append(event.protocol)

    # Not the device's own id: the broker would throw out a device that is at work.
    transport = MqttTransport(
        access.url,
        f"fedzo-doctor-{secrets.token_hex(4)}",
        on_event=on_event,
        subscriptions=device_subscriptions(access.federation, access.device) if access.device else (),
        username=username,
        password=password,
        tls=access.tls(),
    )
    try:
        transport.connect(access.timeout_s)
    finally:
        transport.close(timeout_s=1.0)
    who = f"as {username}" if username else "without a user name"
    rights = f", {access.device} may subscribe" if access.device else ""
    return f"MQTT {protocols[-1] if protocols else ''} {who}{rights}", ""


def describe(error: FedzoError | OSError) -> tuple[str, str]:
    """An error of :func:`broker_findings` as message and hint."""
    if isinstance(error, FedzoError):
        return error.message, error.hint
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            error.verify_message,
            "give the right --ca, and the host name that is in the certificate; check the clock",
        )
    if isinstance(error, ssl.SSLError):
        return f"TLS fails: {error.reason or error}", "check that this port of the broker speaks TLS"
    if isinstance(error, socket.gaierror):
        return f"the host name has no address: {error.strerror}", "check the name in the URL and this network's DNS"
    return (
        f"no connection: {error.strerror or error}",
        "check host and port, and that the broker listens on that address",
    )

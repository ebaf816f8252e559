"""Where the broker is, and what proves who is who: URL, TLS files, password."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from ...protocol.errors import ConfigError

if TYPE_CHECKING:
    import ssl  # loaded when a URL asks for TLS

__all__ = ["Endpoint", "TlsConfig", "read_password"]

PASSWORD_VARIABLE = "FEDZO_PASSWORD"  # noqa: S105 (the name of a variable, not a password)

_DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}
_MAX_PASSWORD_BYTES = 65_535  # MQTT 5.0, section 3.1.3.6: a two-byte length


@dataclass(frozen=True)
class TlsConfig:
    """Files of a TLS connection, all PEM.

    Attributes:
        ca: Certificates that may sign the peer's; the system's own store when empty.
        certificate: The own certificate chain; needs `key`.
        key: The own private key, without a passphrase.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def client_context(self) -> ssl.SSLContext:
        """Load the files into a context that checks the broker's chain and host name.

        Raises:
            ConfigError: A file is missing or is no PEM, or only one of certificate and key is given.
        """
        import ssl

        from .tidy_socket import TidySocket

        if (self.certificate is None) != (self.key is None):
            lacking = "certificate" if self.certificate is None else "key"
            raise ConfigError(f"TLS needs both a certificate and its key; the {lacking} is missing")
        for role, path in (("CA", self.ca), ("certificate", self.certificate), ("key", self.key)):
            if path is not None and not path.is_file():
                raise ConfigError(f"TLS {role} file {path} does not exist", hint="check the path")
        try:
            context = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.sslsocket_class = TidySocket
            if self.certificate is not None and self.key is not None:
                # Without a callback OpenSSL asks on the terminal for the passphrase: a daemon would hang there.
                context.load_cert_chain(self.certificate, self.key, password=_refuse_passphrase)
        except (OSError, ValueError) as error:  # SSLError is an OSError
            files = ", ".join(str(path) for path in (self.ca, self.certificate, self.key) if path is not None)
            raise ConfigError(
                f"cannot load the TLS files {files}: {error}",
                hint="they must be PEM, readable by this user, and the key must belong to the certificate",
            ) from error
        return context


@dataclass(frozen=True)
class Endpoint:
    """A broker's address, parsed from a URL. Text made from it never shows the password."""

    host: str
    port: int
    tls: bool
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """Parse ``mqtt://[user[:password]@]host[:1883]`` or ``mqtts://...[:8883]``.

        Raises:
            ConfigError: The URL has another scheme, no host, a bad port, a path or a query.
        """
        shown = _without_password(url)
        hint = "write mqtt://HOST[:1883], or mqtts://HOST[:8883] for TLS"
        try:
            parts = urlsplit(url)
            port, host = parts.port, parts.hostname
        except ValueError as error:
            raise ConfigError(f"broker URL {shown!r} cannot be read: {error}", hint=hint) from None
        if parts.scheme not in _DEFAULT_PORTS:
            raise ConfigError(f"broker URL {shown!r} has no scheme mqtt:// or mqtts://", hint=hint)
        if not host or any(character.isspace() or not character.isprintable() for character in host):
            raise ConfigError(f"broker URL {shown!r} names no host", hint=hint)
        if port == 0:
            raise ConfigError(f"broker URL {shown!r} has port 0; allowed are 1 to 65535", hint=hint)
        if parts.path not in ("", "/") or parts.query or parts.fragment:
            raise ConfigError(f"broker URL {shown!r} goes on after the port", hint=hint)
        username = None if parts.username is None else unquote(parts.username)
        password = None if parts.password is None else unquote(parts.password)
        if password is not None and not username:
            raise ConfigError(f"broker URL {shown!r} has a password and no user name", hint=hint)
        return cls(host, port or _DEFAULT_PORTS[parts.scheme], parts.scheme == "mqtts", username or None, password)

    def tls_context(self, tls: TlsConfig | None) -> ssl.SSLContext | None:
        """Return the context for this address: None without TLS; the system's certificates when `tls` is None.

        Raises:
            ConfigError: The files cannot be used, or are given for a URL without TLS.
        """
        if self.tls:
            return (tls or TlsConfig()).client_context()
        if tls is not None:
            raise ConfigError(f"TLS files are given, but {self} is a URL without TLS", hint="use mqtts://")
        return None

    @property
    def address(self) -> str:
        """``host:port``, with brackets around an IPv6 address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{'mqtts' if self.tls else 'mqtt'}://{self.address}"


def read_password(path: Path | None, *, variable: str = PASSWORD_VARIABLE) -> str | None:
    """Read a password from the first line of a file, else from the environment; None when neither has one.

    Raises:
        ConfigError: The file cannot be read, is empty, or holds more than MQTT can carry.
    """
    if path is None:
        return os.environ.get(variable) or None
    try:
        with path.open("rb") as file:
            line = file.readline(_MAX_PASSWORD_BYTES + 2).rstrip(b"\r\n")
        password = line.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the password file {path}: {error.__class__.__name__}") from None
    if not password or len(line) > _MAX_PASSWORD_BYTES:
        raise ConfigError(
            f"the first line of the password file {path} has {len(line)} bytes; allowed are 1 to {_MAX_PASSWORD_BYTES}"
        )
    return password


def _without_password(url: str) -> str:
    """Hide everything between the scheme and the last ``@``, also in text that is no URL."""
    return re.sub(r"^([a-z]*://)?.*@", r"\1***@", url, flags=re.IGNORECASE | re.DOTALL)


def _refuse_passphrase() -> str:
    raise ValueError("the private key has a passphrase; a device must start without one")

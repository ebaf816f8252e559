"""The files of a broker's TLS listener."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...edge_runtime.connection.endpoint import TlsConfig

__all__ = ["ServerTls"]


@dataclass(frozen=True)
class ServerTls:
    """PEM files of a TLS listener.

    Attributes:
        certificate: Chain of the broker.
        key: Its private key.
        client_ca: When given, a client must show a certificate that this CA signed.
        revoked: Revocation list of that CA: whose certificate it names is not let in.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None
    revoked: Path | None = None

    def own_client(self) -> TlsConfig:
        """What a server shows a broker of its own: the broker's certificate, which is good for both sides."""
        return TlsConfig(self.client_ca, self.certificate, self.key)

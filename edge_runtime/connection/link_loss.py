"""Why a connection did not come about or ended, in words."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from .endpoint import Endpoint

__all__ = ["Loss", "explain_connect", "explain_end", "unanswered"]


@dataclass(frozen=True)
class Loss:
    """Why a connection did not come about or ended.

    Attributes:
        reason: Half a sentence for people.
        hint: The next action, may be empty.
        final: The same attempt cannot succeed later (credentials, certificate, rights).
        version_refused: The broker said that it does not speak this protocol version.
        silent: The broker closed or ignored the link before any CONNACK.
        refused: The broker is there and does not let this client in, whether for good or not.
    """

    reason: str
    hint: str = ""
    final: bool = False
    version_refused: bool = False
    silent: bool = False
    refused: bool = False


def explain_end(error: OSError | None) -> str:
    """What the network said when a link ended; without an error the other side has closed it."""
    if error is None:
        return "the broker closed it"
    alert = getattr(error, "reason", None)  # of an SSLError, such as SSLV3_ALERT_CERTIFICATE_REVOKED
    if isinstance(alert, str):
        return "TLS: " + alert.lower().replace("_", " ")
    return error.strerror or str(error) or type(error).__name__


def unanswered(reason: str, endpoint: Endpoint, client_id: str, *, ended: bool) -> Loss:
    """The link came about, but not the session.

    Args:
        reason: What happened to the link.
        endpoint: The broker.
        client_id: Of this client.
        ended: The other side ended it. With TLS 1.3 a broker that refuses the client's certificate does that after a
            handshake which was good for the client.
    """
    problem = f"the broker did not answer CONNECT: {reason}"
    if not endpoint.tls:
        return Loss(problem, "is this a port with TLS? Then use mqtts://", silent=True)
    if not ended:
        return Loss(problem, silent=True)
    hint = (
        "the broker may have refused or revoked this certificate; "
        f"a device gets a new one from: fedzo credentials issue {client_id}"
    )
    return Loss(problem, hint, silent=True, refused=True)


def explain_connect(error: OSError | ValueError, endpoint: Endpoint) -> Loss:
    """Say in words what a failed TCP or TLS connect means."""
    loss = _explain_tls(error) if endpoint.tls else None
    if loss is not None:
        return loss
    if isinstance(error, socket.gaierror) or (isinstance(error, ValueError) and not isinstance(error, OSError)):
        return Loss(f"the host name {endpoint.host!r} cannot be resolved", "check the host name and the network")
    if isinstance(error, ConnectionRefusedError):
        return Loss("nobody listens there (connection refused)", "start the broker, or check host and port")
    if isinstance(error, TimeoutError):
        return Loss("the host does not answer (timed out)", "check the host, the network and its firewall")
    return Loss(f"connecting failed: {error.strerror if isinstance(error, OSError) else error}")


def _explain_tls(error: OSError | ValueError) -> Loss | None:
    import ssl

    if isinstance(error, ssl.SSLCertVerificationError):
        hint = "give the CA that signed the broker's certificate, and use the host name that the certificate names"
        return Loss(f"the broker's certificate is not trusted: {error.verify_message}", hint, final=True)
    if isinstance(error, (ssl.SSLError, ConnectionResetError)):
        reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        return Loss(f"TLS failed: {reason or error}", "is this a port without TLS? Then use mqtt://")
    return None

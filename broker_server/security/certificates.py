"""A certificate authority of one's own: X.509 with ECDSA over P-256, by the ``cryptography`` library.

Certificates are valid from a day before they are made, as the clocks of small boards are late.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...protocol.errors import ConfigError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

__all__ = ["MAX_DAYS", "Authority", "IssuedCertificate", "check_host", "need_library"]

MAX_DAYS = 3650
_EARLIER = dt.timedelta(days=1)
_HOST = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)


@dataclass(frozen=True)
class IssuedCertificate:
    """A certificate with its key.

    Attributes:
        certificate: PEM.
        key: PEM, PKCS #8, without a passphrase: boards start alone.
        serial: Its number.
        expires: When it ends, UTC.
    """

    certificate: bytes
    key: bytes = field(repr=False)
    serial: int
    expires: dt.datetime


class Authority:
    """Signs certificates and revocation lists.

    Args:
        certificate: Its own, PEM.
        key: Its private key, PEM.

    Raises:
        ConfigError: These are no certificate and key, or do not belong together; or the library is missing.
    """

    def __init__(self, certificate: bytes, key: bytes) -> None:
        need_library()
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

        try:
            self._certificate = x509.load_pem_x509_certificate(certificate)
            private = serialization.load_pem_private_key(key, None)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"the CA's certificate or key cannot be read: {error}") from None
        if not isinstance(private, EllipticCurvePrivateKey) or private.public_key() != self._certificate.public_key():
            raise ConfigError("the CA's key does not belong to its certificate")
        self._key: EllipticCurvePrivateKey = private
        self.certificate = certificate

    @classmethod
    def create(cls, name: str, *, days: int = MAX_DAYS) -> tuple[Authority, bytes]:
        """Make a new one.

        Returns:
            The authority, and its key as PEM.
        """
        need_library()
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes

        key = _new_key()
        usage = x509.KeyUsage(
            digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
            key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        builder = (
            _builder(_name(name), _name(name), key, x509.random_serial_number(), days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
        )
        certificate = _pem(builder.sign(key, hashes.SHA256()))
        private = _private_pem(key)
        return cls(certificate, private), private

    def issue(self, name: str, *, days: int, hosts: Iterable[str] = ()) -> IssuedCertificate:
        """Make a key and a certificate for it.

        Args:
            name: The common name: a device id, which brokers take for the user.
            days: Validity, counted from now; never longer than the authority's own.
            hosts: Names and addresses of a server; without any it is a client's certificate.

        Raises:
            ConfigError: The validity is none, or a host is no host.
        """
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.x509.oid import ExtendedKeyUsageOID

        if not 1 <= days <= MAX_DAYS:
            raise ConfigError(f"a validity of {days} days; allowed are 1 to {MAX_DAYS}")
        key, serial = _new_key(), x509.random_serial_number()
        until = min(_now() + dt.timedelta(days=days), self.expires)
        hosts = [check_host(host) for host in hosts]
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH] + ([ExtendedKeyUsageOID.SERVER_AUTH] if hosts else [])
        builder = (
            _builder(_name(name), self._certificate.subject, key, serial, until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(h) for h in hosts]), False)
        return IssuedCertificate(_pem(builder.sign(self._key, hashes.SHA256())), _private_pem(key), serial, until)

    @property
    def expires(self) -> dt.datetime:
        """When its own certificate ends, UTC."""
        return self._certificate.not_valid_after_utc

    def revocation_list(self, revoked: Mapping[int, dt.datetime], number: int) -> bytes:
        """A signed list of serial numbers that are no longer good; it holds until the authority itself ends.

        Args:
            revoked: When each was revoked.
            number: Greater than that of any list before.
        """
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization

        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificate.subject)
            .last_update(_now() - _EARLIER)
            .next_update(self.expires)
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        for serial, date in revoked.items():
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(date).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def check_host(host: str) -> str:
    """Return a host name or an IP address that a certificate can name.

    Raises:
        ConfigError: It is neither.
    """
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        if not _HOST.fullmatch(host):
            raise ConfigError(
                f"{host[:60]!r} is no host name and no IP address", hint="such as server.local or 192.168.1.10"
            ) from None
        return host.lower()


def need_library() -> None:
    """Make sure that certificates and signatures can be made.

    Raises:
        ConfigError: They cannot.
    """
    try:
        import cryptography.hazmat.primitives.asymmetric.ed25519  # noqa: F401
    except ImportError:
        raise ConfigError(
            "certificates and signatures need the cryptography library, which is not installed",
            hint="pip install 'fedzo[server]'",
        ) from None


def _now() -> dt.datetime:
    return dt.datetime.now(dt.timezone.utc).replace(microsecond=0)


def _new_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _builder(
    name: x509.Name,
    issuer: x509.Name,
    key: EllipticCurvePrivateKey,
    serial: int,
    until: dt.datetime | int,
) -> x509.CertificateBuilder:
    from cryptography import x509

    end = _now() + dt.timedelta(days=until) if isinstance(until, int) else until
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(_now() - _EARLIER)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(text: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return certificate.public_bytes(serialization.Encoding.PEM)


def _private_pem(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )

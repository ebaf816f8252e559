"""The credentials of a federation in one folder, mode 0700: ``fedzo credentials`` writes it, ``fedzo serve`` reads it.

====================  =================================================================================
file                  content
====================  =================================================================================
``federation.json``   who belongs to it; the other files follow from this one and from the keys
``ca.pem, ca.key``    the federation's own certificate authority
``server.pem, .key``  certificate of the broker, which the server also shows to it
``revoked.pem``       revocation list
``run.key``           signs runs, see ``signing.py``
``mosquitto/``        the same for a Mosquitto that somebody else starts: settings, password file, access list
``devices/DEVICE/``   what one board needs, to be copied to it as a folder
====================  =================================================================================

Every file is replaced atomically and has mode 0600. ``federation.json`` names the serial number of a device's
certificate before that is written: a crash leaves at most a number without a file, never a certificate that cannot be
revoked.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...edge_runtime.installation.device_bundle import BUNDLE_NAMES, DeviceBundle
from ...protocol.errors import ConfigError
from ...protocol.wire.topics import check_name
from ..brokers.base import MAX_PACKET_BYTES
from ..brokers.credentials import SERVER_NAME, hash_password
from ..brokers.mosquitto import MAX_QUEUED_BYTES
from ..brokers.private_files import read_private, write_private
from ..brokers.server_tls import ServerTls
from .certificates import Authority, check_host
from .credential_registry import DeviceEntry, Registry
from .signing import RUN_KEY_NAME, RunSigner

__all__ = ["DEFAULT_DAYS", "REGISTRY_NAME", "TLS_PORT", "CredentialFolder"]

TLS_PORT = 8883
DEFAULT_DAYS = 825
REGISTRY_NAME = "federation.json"
MOSQUITTO_PLACE = "/etc/mosquitto/fedzo"

_MAX_REGISTRY_BYTES = 64 << 20
_MAX_PEM_BYTES = 1 << 20
_LOCAL = ("localhost", "127.0.0.1", "::1")
_MOSQUITTO = f"""\
# Copied to {MOSQUITTO_PLACE} and owned by the user that mosquitto runs as, to be named in mosquitto.conf:
#   include_dir {MOSQUITTO_PLACE}/conf.d
# After every change of the credentials copy the folder again and send mosquitto SIGHUP.
per_listener_settings false
listener {TLS_PORT}
certfile {MOSQUITTO_PLACE}/server.pem
keyfile {MOSQUITTO_PLACE}/server.key
cafile {MOSQUITTO_PLACE}/ca.pem
crlfile {MOSQUITTO_PLACE}/revoked.pem
require_certificate true
tls_version tlsv1.2
allow_anonymous false
password_file {MOSQUITTO_PLACE}/passwords
acl_file {MOSQUITTO_PLACE}/rights
# Else a device takes over another's session by using its client id.
use_username_as_clientid true
# The default of 1000 acknowledges reports of a large fleet and drops them while the server is away.
max_queued_messages 100000
max_queued_bytes {MAX_QUEUED_BYTES}
max_inflight_messages 500
max_packet_size {MAX_PACKET_BYTES}
set_tcp_nodelay true
"""


class CredentialFolder:
    """One folder, read when it is opened.

    Args:
        path: Where it lies.

    Attributes:
        registry: Who belongs to the federation.

    Raises:
        ConfigError: There is none, or it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._read_at = (0, 0)
        if not (self.path / REGISTRY_NAME).is_file():
            raise ConfigError(f"{path} is no credentials folder", hint="make one with: fedzo credentials init")
        self.registry = self._read()

    @classmethod
    def create(
        cls, path: Path, *, federation: str = "default", hosts: Sequence[str] = (), days: int = DEFAULT_DAYS
    ) -> CredentialFolder:
        """Make a new one.

        Args:
            path: A folder that is not there, or empty.
            federation: Its name.
            hosts: Names and addresses under which devices reach the broker; this machine's name when there are none.
            days: Validity of the broker's certificate.

        Raises:
            ConfigError: The folder holds something, a name cannot be used, or a file cannot be written.
        """
        path = path.absolute()
        if path.is_dir() and any(path.iterdir()):
            raise ConfigError(f"the folder {path} is not empty", hint="name a new one, or fedzo credentials issue")
        check_name("federation", federation)
        names = _hosts(hosts)
        authority, key = Authority.create(f"fedzo {federation}")
        server = authority.issue(SERVER_NAME, days=days, hosts=names)
        registry = Registry(federation, names, secrets.token_urlsafe(24), server.expires.isoformat())
        try:
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o700)
        except OSError as error:
            raise ConfigError(f"cannot make the folder {path}: {error.strerror or error}") from None
        with _locked(path):
            if (path / REGISTRY_NAME).exists():
                raise ConfigError(f"somebody else has just made {path}", hint="look at it: fedzo credentials list")
            write_private(path / "ca.key", key)
            write_private(path / "ca.pem", authority.certificate)
            write_private(path / "server.key", server.key)
            write_private(path / "server.pem", server.certificate + authority.certificate)
            write_private(path / "revoked.pem", authority.revocation_list({}, registry.list_number))
            RunSigner.open(path / RUN_KEY_NAME)
            write_private(path / REGISTRY_NAME, registry.encode())
            folder = cls(path)
            folder._write_mosquitto()
        return folder

    def renew_server(self, *, hosts: Sequence[str] = (), days: int = DEFAULT_DAYS) -> None:
        """Give the broker a new certificate, under other names if there are any. A running one needs a restart.

        Raises:
            ConfigError: A host is none, or a file cannot be written.
        """
        with self._changing() as authority:
            names = _hosts(hosts) if hosts else self.registry.hosts
            server = authority.issue(SERVER_NAME, days=days, hosts=names)
            write_private(self.path / "server.key", server.key)
            write_private(self.path / "server.pem", server.certificate + authority.certificate)
            old = self.registry
            self.registry = Registry(
                old.federation, names, old.server_password, server.expires.isoformat(), old.list_number,
                old.devices, old.revoked_serials,
            )  # fmt: skip

    def issue(self, devices: Sequence[str], *, days: int = DEFAULT_DAYS) -> list[Path]:
        """Make a device's key, certificate and password.

        A device that has some gets a new key and certificate; its password stays and its old certificate holds until
        it ends, so that nothing breaks before the new folder is on the board. A revoked device gets all anew.

        Returns:
            The folders, one a device, each to be copied to its board.

        Raises:
            ConfigError: A name or the validity cannot be used, and nothing is changed; or a file cannot be written.
        """
        bundles = []
        with _locked(self.path):
            authority = self._begin()
            key = self.signer().public_key
            registry = self.registry
            for name in devices:
                old = registry.devices.get(name)
                password = secrets.token_urlsafe(24) if old is None or old.revoked else old.password
                kept = () if old is None or old.revoked else (old.hashed, old.serials)
                hashed, serials = kept or (hash_password(password), ())
                # First, as it checks the name, which is to be a path.
                entry = DeviceEntry(password, hashed, serials, "")
                registry.with_device(name, entry)
                issued = authority.issue(name, days=days)
                entry = DeviceEntry(password, hashed, (*serials, issued.serial), issued.expires.isoformat())
                folder = self.path / "devices" / name
                registry = registry.with_device(name, entry)
                bundles.append((DeviceBundle(folder, registry.federation, name, password, key), issued))
            self.registry = registry
            self._save()  # before the first bundle: what is not recorded could never be revoked
            for bundle, issued in bundles:
                self._write_bundle(bundle, authority.certificate, issued.certificate, issued.key)
        return [bundle.folder for bundle, _ in bundles]

    def revoke(self, device: str) -> None:
        """Take a device's rights; a server that uses the folder sees it within seconds.

        Raises:
            ConfigError: There is no such device, it is revoked already, or a file cannot be written.
        """
        with self._changing() as authority:
            self.registry = self.registry.without_rights(device, _now().isoformat())
            dates = {n: dt.datetime.fromisoformat(when) for n, when in self.registry.revoked_serials.items()}
            write_private(self.path / "revoked.pem", authority.revocation_list(dates, self.registry.list_number))
            shutil.rmtree(self.path / "devices" / device, ignore_errors=True)

    def reload(self) -> Registry:
        """Read again who belongs to the federation.

        Raises:
            ConfigError: The file cannot be read.
        """
        self.registry = self._read()
        return self.registry

    def has_changed(self) -> bool:
        """Whether the registry is another one than was read last."""
        return self._stamp() != self._read_at

    def signer(self) -> RunSigner:
        """The run's key.

        Raises:
            ConfigError: It cannot be read.
        """
        return RunSigner.open(self.path / RUN_KEY_NAME)

    @property
    def server_tls(self) -> ServerTls:
        """Files of a TLS listener that lets in who has a certificate of this folder."""
        path = self.path
        return ServerTls(path / "server.pem", path / "server.key", path / "ca.pem", path / "revoked.pem")

    def join_command(self, device: str = "DEVICE", *, port: int = TLS_PORT) -> str:
        """What a board runs once its folder is there."""
        host = self.registry.hosts[0]
        where = f"[{host}]" if ":" in host else host
        return f"fedzo-device join mqtts://{where}:{port} --credentials {device} --data DATA"

    # --- files ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Authority]:
        """Change `registry` inside: nobody else does meanwhile, and it is on the disk afterwards."""
        with _locked(self.path):
            yield self._begin()
            self._save()

    def _begin(self) -> Authority:
        self.registry = self._read()
        return Authority(self._pem("ca.pem"), self._pem("ca.key"))

    def _save(self) -> None:
        write_private(self.path / REGISTRY_NAME, self.registry.encode())
        self._write_mosquitto()

    def _read(self) -> Registry:
        stamp = self._stamp()  # before: what changes while it is read must be read again
        registry = Registry.decode(read_private(self.path / REGISTRY_NAME, _MAX_REGISTRY_BYTES))
        self._read_at = stamp
        return registry

    def _stamp(self) -> tuple[int, int]:
        """Something that changes with the registry, which is replaced as a whole; zeros while it cannot be seen."""
        try:
            found = (self.path / REGISTRY_NAME).stat()
        except OSError:
            return 0, 0
        return found.st_mtime_ns, found.st_ino

    def _pem(self, name: str) -> bytes:
        return read_private(self.path / name, _MAX_PEM_BYTES)

    def _write_bundle(self, bundle: DeviceBundle, ca: bytes, certificate: bytes, key: bytes) -> None:
        _make_private(bundle.folder.parent)
        _make_private(bundle.folder)
        files = (ca, certificate, key, json.dumps(bundle.to_document(), indent=1).encode() + b"\n")
        for name, data in zip(BUNDLE_NAMES, files, strict=True):
            write_private(bundle.folder / name, data)

    def _write_mosquitto(self) -> None:
        folder, credentials = self.path / "mosquitto", self.registry.credentials()
        _make_private(folder)
        _make_private(folder / "conf.d")
        write_private(folder / "passwords", credentials.mosquitto_password_file().encode())
        write_private(folder / "rights", credentials.mosquitto_acl_file().encode())
        for name in ("ca.pem", "server.pem", "server.key", "revoked.pem"):
            write_private(folder / name, self._pem(name))
        write_private(folder / "conf.d" / "fedzo.conf", _MOSQUITTO.encode())


def _hosts(hosts: Sequence[str]) -> tuple[str, ...]:
    """The names that the broker's certificate gets: those given and this machine's own for local clients."""
    given = [check_host(host) for host in hosts or (socket.gethostname(),)]
    return tuple(dict.fromkeys((*given, *_LOCAL)))


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {folder}: {error.strerror or error}") from None


def _now() -> dt.datetime:
    return dt.datetime.now(dt.timezone.utc).replace(microsecond=0)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        with os.fdopen(os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise ConfigError(f"cannot use the folder {folder}: {error.strerror or error}") from None

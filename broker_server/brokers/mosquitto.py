"""Mosquitto as a managed child process: the recommended broker."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from pathlib import Path

from ...protocol.errors import BrokerError, ConfigError
from .base import MAX_PACKET_BYTES, Broker
from .child import ChildBroker
from .credentials import Credentials
from .listen_address import choose_port, client_host
from .private_files import OWNER_NAME, PrivateFolder, read_private, write_private
from .server_tls import ServerTls

__all__ = ["MAX_QUEUED_BYTES", "MosquittoBroker", "ServerTls", "find_mosquitto", "place_of_files"]

MAX_QUEUED_BYTES = 256 << 20  # for each absent or slow client: 64,000 reports of 4 kB

_log = logging.getLogger(__name__)

# Debian puts it into /usr/sbin, which is not in the PATH of ordinary users; Homebrew into its own sbin.
_USUAL_PLACES = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")
_RUNTIME = Path("/run")
_MAX_PEM_BYTES = 1 << 20
_MAX_REVOKED_BYTES = 64 << 20


def find_mosquitto() -> str | None:
    """Return the path of the mosquitto program, None when there is none."""
    places = os.pathsep.join((os.environ.get("PATH", os.defpath), *_USUAL_PLACES))
    return shutil.which("mosquitto", path=places)


class MosquittoBroker(Broker):
    """Writes configuration, password and access files into a private folder, runs mosquitto on them.

    It keeps nothing on disk: persistence would only repeat what the journal knows. A crash leads to a restart.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 1883,
        *,
        credentials: Credentials | None = None,
        tls: ServerTls | None = None,
        max_queued_messages: int = 100_000,
        max_packet_bytes: int = MAX_PACKET_BYTES,
        program: str | None = None,
        folder: Path | None = None,
    ) -> None:
        """Prepare; nothing is written or started.

        Args:
            host: Address to listen at.
            port: Port to listen at; 0 chooses a free one at the first start.
            credentials: Logins and rights; None lets everybody in.
            tls: Makes the listener a TLS listener; the server then gets a plain one of its own on loopback.
            max_queued_messages: Per absent or slow client. Mosquitto's default of 1000 acknowledges and then drops
                reports of a large fleet while the server is away; allow four per device.
            max_packet_bytes: Of one packet; a client with a larger one is thrown out.
            program: Path of mosquitto; searched for when None.
            folder: Where the folder of its files is made, see `place_of_files`.

        Raises:
            BrokerError: There is no mosquitto.
        """
        found = program or find_mosquitto()
        if found is None:
            raise BrokerError(
                "mosquitto is not installed",
                hint="sudo apt install mosquitto (or brew install mosquitto), or use --broker embedded",
            )
        self._program = found
        self._host = host
        self._port = port
        self._local_port = 0
        self._tls = tls
        self._max_queued_messages, self._max_packet_bytes = max_queued_messages, max_packet_bytes
        self._parent = folder
        self._folder: PrivateFolder | None = None
        self._child: ChildBroker | None = None
        self.credentials = credentials
        self.login = credentials.server if credentials else None
        self.url = ""
        secrecy = "no TLS" if tls is None else "TLS with certificates of the devices" if tls.client_ca else "TLS"
        rights = "passwords and topic rights" if credentials else "no passwords: whoever reaches it may do everything"
        self.description = f"mosquitto ({found}): {rights}; {secrecy}; keeps nothing across its own restart"

    @property
    def port(self) -> int:
        """Port for the devices; known after the first start."""
        return self._port

    @property
    def pid(self) -> int | None:
        """Process id of mosquitto."""
        return self._child.pid if self._child else None

    def start(self) -> None:
        """Write the files and start; see `Broker.start`."""
        if self._child is not None:
            return
        self._port = choose_port(self._host, self._port)
        if self._tls is not None:
            self._local_port = choose_port("127.0.0.1", self._local_port)
            self.url = f"mqtt://127.0.0.1:{self._local_port}"
        else:
            host = client_host(self._host)
            self.url = f"mqtt://[{host}]:{self._port}" if ":" in host else f"mqtt://{host}:{self._port}"
        user = _unprivileged_user()
        self._folder = PrivateFolder(".fedzo-mosquitto-", parent=place_of_files(user, self._parent))
        try:
            config = self._write_files(self._folder.path)
            _give_to(user, self._folder.path)
            child = ChildBroker(
                [self._program, "-c", str(config)], name="mosquitto", host=self._host, port=self._port, user=user
            )
            child.start()
        except BaseException:
            self._remove_folder()
            raise
        self._child = child

    def stop(self) -> None:
        """Stop mosquitto and remove its files."""
        if self._child is not None:
            self._child.stop()
            self._child = None
        self._remove_folder()

    def alive(self) -> bool:
        """Whether clients can connect now."""
        return self._child is not None and self._child.alive()

    def failure(self) -> str | None:
        """Say how mosquitto died for good."""
        return self._child.failure() if self._child else None

    def update_credentials(self, credentials: Credentials) -> bool:
        """Take over new logins and the revocation list; see `Broker.update_credentials`.

        On SIGHUP Mosquitto reads them again (measured with 2.0.11): who has no login any more is disconnected, the
        others are not, and a certificate that the list names fails the next handshake.
        """
        if self.credentials is None:
            raise ConfigError("this broker was started without credentials; restart it with them")
        self.credentials = credentials
        if self._child is not None and self._folder is not None:
            self._write_credentials(self._folder.path, credentials)
            self._write_revoked(self._folder.path)
            _give_to(_unprivileged_user(), self._folder.path)
            self._child.signal(signal.SIGHUP)
        return True

    def _write_files(self, folder: Path) -> Path:
        # A listener's own: without it a device with its own password takes over another's session by its client id.
        own_sessions = [] if self.credentials is None else ["use_username_as_clientid true"]
        lines = [f"listener {self._port} {self._host}".rstrip(), *own_sessions]
        if self._tls is not None:
            # Copies, because mosquitto may run as a user that cannot read the originals.
            write_private(folder / "certificate.pem", read_private(self._tls.certificate, _MAX_PEM_BYTES))
            write_private(folder / "key.pem", read_private(self._tls.key, _MAX_PEM_BYTES))
            lines += [f"certfile {folder / 'certificate.pem'}", f"keyfile {folder / 'key.pem'}", "tls_version tlsv1.2"]
            if self._tls.client_ca is not None:
                write_private(folder / "client-ca.pem", read_private(self._tls.client_ca, _MAX_PEM_BYTES))
                lines += [f"cafile {folder / 'client-ca.pem'}", "require_certificate true"]
            if self._write_revoked(folder):
                lines += [f"crlfile {folder / 'revoked.pem'}"]
            lines += [f"listener {self._local_port} 127.0.0.1", *own_sessions]
        lines += [
            "persistence false",
            f"max_queued_messages {self._max_queued_messages}",
            f"max_queued_bytes {MAX_QUEUED_BYTES}",
            "max_inflight_messages 500",  # default 20; the server acknowledges whole batches after one commit
            f"max_packet_size {self._max_packet_bytes}",
            "set_tcp_nodelay true",
            "log_dest stdout",
            "log_type error",
            "log_type warning",
            "connection_messages false",
        ]
        if self.credentials is None:
            lines.append("allow_anonymous true")
        else:
            self._write_credentials(folder, self.credentials)
            lines += [
                "allow_anonymous false",
                f"password_file {folder / 'passwords'}",
                f"acl_file {folder / 'rights'}",
            ]
        config = folder / "mosquitto.conf"
        write_private(config, ("\n".join(lines) + "\n").encode())
        return config

    def _write_credentials(self, folder: Path, credentials: Credentials) -> None:
        write_private(folder / "passwords", credentials.mosquitto_password_file().encode())
        write_private(folder / "rights", credentials.mosquitto_acl_file().encode())

    def _write_revoked(self, folder: Path) -> bool:
        if self._tls is None or self._tls.revoked is None:
            return False
        write_private(folder / "revoked.pem", read_private(self._tls.revoked, _MAX_REVOKED_BYTES))
        return True

    def _remove_folder(self) -> None:
        if self._folder is not None:
            self._folder.remove()
            self._folder = None


def place_of_files(user: str, folder: Path | None) -> Path | None:
    """Where the private files lie: nobody may clean up there by age, as Mosquitto reads them again after months.

    Args:
        user: Who Mosquitto runs as if not as the own user.
        folder: Where the own user keeps files that stay.

    Returns:
        ``/run`` for another user, who may have no way into the own user's folders; None for the temporary folder.
    """
    if not user:
        return folder and folder.resolve()
    return _RUNTIME if os.access(_RUNTIME, os.W_OK) else None


def _unprivileged_user() -> str:
    """Return the user that mosquitto should run as: empty for the own one, somebody else when that is root."""
    if os.geteuid() != 0:
        return ""
    import pwd

    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("mosquitto", "nobody") if name in names), "")


def _give_to(user: str, folder: Path) -> None:
    """Let another user read the files.

    The folder stays one's own, as root without CAP_DAC_OVERRIDE could neither write into another one nor remove it.

    Raises:
        BrokerError: It is not allowed.
    """
    if not user:
        return
    import pwd

    entry = pwd.getpwnam(user)
    try:
        for path in folder.iterdir():
            if path.name != OWNER_NAME and not path.is_symlink():
                os.chown(path, entry.pw_uid, -1, follow_symlinks=False)
        os.chown(folder, -1, entry.pw_gid)
        folder.chmod(0o710)
    except OSError as error:
        raise BrokerError(
            f"cannot give the broker's files to the user {user}, whom mosquitto runs as: {error.strerror}",
            hint="run fedzo serve as a user who is not root, or use --broker URL",
        ) from None

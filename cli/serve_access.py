"""How `fedzo serve` and its devices know each other: the broker's credentials, the run's key, what a device is told."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Protocol

from ..broker_server.brokers.base import Broker
from ..broker_server.brokers.choose import open_broker
from ..broker_server.brokers.credentials import Login
from ..broker_server.brokers.listen_address import own_address
from ..broker_server.security.access import Access, AccessWatch
from ..broker_server.security.credential_folder import TLS_PORT, CredentialFolder
from ..broker_server.security.signing import RUN_KEY_NAME, RunSigner
from ..broker_server.server import Server
from ..edge_runtime.connection.endpoint import Endpoint, TlsConfig, read_password
from ..protocol.errors import ConfigError
from .output import Output

__all__ = ["TLS_PORT", "ServeAccess", "folder_federation"]

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class _Settings(Protocol):
    """The part of the settings of `fedzo serve` that is needed here."""

    @property
    def broker(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def federation(self) -> str: ...
    @property
    def username(self) -> str | None: ...
    @property
    def password_file(self) -> Path | None: ...
    @property
    def ca(self) -> Path | None: ...
    @property
    def credentials(self) -> Path | None: ...


def folder_federation(folder: Path, federation: str) -> str:
    """The federation of a credentials folder.

    Raises:
        ConfigError: Another one was asked for, or there is no such folder.
    """
    own = CredentialFolder(folder).registry.federation
    if federation not in ("default", own):
        raise ConfigError(f"the credentials are for the federation {own}, not for {federation}")
    return own


class ServeAccess:
    """For all runs that one process serves.

    Args:
        settings: Where and how it serves.
        runs: Folder of the run folders; the broker's private files lie there, and the run's key without credentials.

    Attributes:
        broker: Not started yet.

    Raises:
        ConfigError: Credentials, key or login cannot be used.
        BrokerError: The broker is not installed.
    """

    def __init__(self, settings: _Settings, runs: Path) -> None:
        self._settings = settings
        self._folder: CredentialFolder | None = None
        login = None
        if settings.password_file is not None and settings.username is None:
            raise ConfigError("a password file is given, but no user name", hint="give --username too")
        if settings.username is not None:
            login = Login(settings.username, read_password(settings.password_file) or "")
        tls = TlsConfig(ca=settings.ca) if settings.ca is not None else None
        if settings.credentials is not None:
            self._folder = CredentialFolder(settings.credentials)
            if "://" in settings.broker and login is None and not Endpoint.parse(settings.broker).tls:
                raise ConfigError(
                    f"the server's password would cross the network readable: {settings.broker} is no mqtts:// URL",
                    hint="use mqtts://, or --username and --password-file if that network is yours alone",
                )
        folder = self._folder
        self.broker: Broker = open_broker(
            settings.broker,
            settings.host,
            settings.port,
            credentials=folder.registry.credentials() if folder else None,
            server_tls=folder.server_tls if folder else None,
            login=login,
            tls=tls,
            client_id=f"fedzo-server-{settings.federation}",
            folder=runs,
        )
        self._run_key = runs / RUN_KEY_NAME
        if folder is not None or self._run_key.exists():
            _ = self.access  # A damaged key is said before a broker is started.

    @cached_property
    def access(self) -> Access:
        """Who takes part, and the run's key, which is made if there is none: not before there is a broker.

        Raises:
            ConfigError: The key cannot be read or written.
        """
        folder = self._folder
        return Access(folder.signer() if folder else RunSigner.open(self._run_key), folder)

    def watch(self, server: Server, stack: ExitStack) -> None:
        """Let changes of the credentials take effect while this server runs."""
        if self._folder is not None:
            stack.enter_context(AccessWatch(self._folder, self.access, self.broker, server.dismiss))

    def tell(self, output: Output) -> None:
        """Say how devices join."""
        settings, folder = self._settings, self._folder
        output.say(f"broker: {self.broker.description}")
        output.say(f"run key: {self.access.signer.public_key.hex()}")
        is_external = "://" in settings.broker
        if folder is None and not is_external and settings.host not in _LOOPBACK:
            output.warn("whoever reaches this broker may do everything: it asks for no password")
        url = self.broker.url if is_external else self._url_for_others(output)
        command = f"fedzo-device join {url} --federation {settings.federation} --data ..."
        if folder is not None and is_external:
            command = f"fedzo-device join {self.broker.url} --credentials DEVICE --data ..."
        elif folder is not None:
            command = folder.join_command(port=getattr(self.broker, "port", settings.port))
        output.say(f"devices join with: {command}")

    def _url_for_others(self, output: Output) -> str:
        """Of a broker of one's own that listens at all addresses, one that other machines can reach."""
        url, host = Endpoint.parse(self.broker.url), own_address(self._settings.host)
        if host is None:
            output.say(f"on other machines write this machine's address instead of {url.host}:")
            return self.broker.url
        return str(dataclasses.replace(url, host=host))

"""A broker that somebody else runs."""

from __future__ import annotations

import logging
import secrets
import socket

from ...edge_runtime.connection.endpoint import Endpoint, TlsConfig
from ...edge_runtime.connection.transport import MqttTransport
from .base import Broker
from .credentials import Credentials, Login

__all__ = ["ExternalBroker"]

_log = logging.getLogger(__name__)

_TIMEOUT_S = 15.0


class ExternalBroker(Broker):
    """Only looks whether the broker is there; rights and limits are up to whoever runs it."""

    def __init__(
        self, url: str, *, login: Login | None = None, tls: TlsConfig | None = None, client_id: str = ""
    ) -> None:
        """Check the URL; nothing is connected.

        Args:
            url: ``mqtt://`` or ``mqtts://``; a user name and a password in it are used when `login` is None.
            login: User name and password of the server.
            tls: Files for a ``mqtts://`` URL.
            client_id: Of the server; its user name when empty. A user name may serve several federations, whose servers
                would throw each other out if it were the client id of all of them.

        Raises:
            ConfigError: The URL cannot be used.
        """
        self._endpoint = Endpoint.parse(url)
        if login is None and self._endpoint.username is not None:
            login = Login(self._endpoint.username, self._endpoint.password or "")
        self.url = str(self._endpoint)
        self.login = login
        self.tls = tls
        self.client_id = client_id
        self.description = f"external broker {self.url}: logins, topic rights and limits are its own"

    def start(self) -> None:
        """Connect once.

        Raises:
            BrokerError: It cannot be reached, or refuses the login.
            ConfigError: A TLS file cannot be used.
        """
        # The probe comes as the server will, since a broker may tie the client id to user or certificate. So it must
        # neither wipe the server's session nor acknowledge what waits there.
        name = self.client_id or (self.login.username if self.login else f"fedzo-probe-{secrets.token_hex(4)}")
        is_server = bool(self.client_id or self.login)
        probe = MqttTransport(
            self.url,
            name,
            on_event=lambda _event: None,
            username=self.login.username if self.login else None,
            password=self.login.password if self.login else None,
            tls=self.tls,
            clean_start=not is_server,
            session_expiry_s=86_400 if is_server else 0,
            manual_ack=True,
        )
        probe.connect(_TIMEOUT_S)
        probe.close()

    def stop(self) -> None:
        """Do nothing: it is not ours."""

    def alive(self) -> bool:
        """Whether its port accepts connections."""
        try:
            with socket.create_connection((self._endpoint.host, self._endpoint.port), timeout=2.0):
                return True
        except OSError:
            return False

    def update_credentials(self, credentials: Credentials) -> bool:
        """Do nothing: its own administrator looks after it. The coordinator refuses whoever has lost the rights."""
        _log.info("%s must be told of %d devices by its administrator", self.url, len(credentials.devices))
        return False

    def failure(self) -> str | None:
        """Return None: whoever runs it may bring it back at any time, and clients try for ever."""

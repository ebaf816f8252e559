"""The contract of a broker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import TYPE_CHECKING

from ...edge_runtime.connection.endpoint import TlsConfig
from ...protocol.wire.framing import MAX_PAYLOAD_BYTES
from .credentials import Credentials, Login

if TYPE_CHECKING:
    from typing_extensions import Self  # typing.Self came with Python 3.11

__all__ = ["MAX_PACKET_BYTES", "Broker"]

MAX_PACKET_BYTES = MAX_PAYLOAD_BYTES + 4096  # topic and properties come on top


class Broker(ABC):
    """Something that speaks MQTT at an address; not started by its constructor.

    Attributes:
        url: Where a client on this machine reaches it; known after `start` at the latest.
        description: One line: what it is, and what it lacks.
        credentials: Who may do what; None when everybody may do everything, or when somebody else decides.
        login: Of the server itself; None when there are no passwords.
        client_id: MQTT client id that the server should use; its user name, or one of the federation's, when empty.
        tls: Files that a client on this machine needs for `url`; None for a URL without TLS, or the system's.
    """

    url: str
    description: str
    credentials: Credentials | None = None
    login: Login | None = None
    client_id: str = ""
    tls: TlsConfig | None = None

    @abstractmethod
    def start(self) -> None:
        """Return when clients can connect.

        Raises:
            BrokerError: It cannot be started or reached; the message names the address.
        """

    @abstractmethod
    def stop(self) -> None:
        """End what `start` began. Idempotent; the broker can be started again at the same address."""

    @abstractmethod
    def alive(self) -> bool:
        """Whether clients can connect now."""

    @abstractmethod
    def failure(self) -> str | None:
        """Say in a line why it will not come back by itself; None while it is alive, restarting, or stopped."""

    @abstractmethod
    def update_credentials(self, credentials: Credentials) -> bool:
        """Take over logins and rights while it runs: who has none any more is disconnected, the others are not.

        Returns:
            Whether it did; False for a broker that whoever runs it must tell.

        Raises:
            ConfigError: The broker was made without credentials, or its files cannot be written.
        """

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

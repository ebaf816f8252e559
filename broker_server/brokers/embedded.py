"""amqtt as a child process: a broker for one machine, without installing anything but Python packages."""

from __future__ import annotations

import json
import sys

from ...protocol.errors import BrokerError, ConfigError
from .base import Broker
from .child import ChildBroker
from .credentials import Credentials
from .listen_address import choose_port
from .server_tls import ServerTls

__all__ = ["EmbeddedBroker"]


class EmbeddedBroker(Broker):
    """Runs `amqtt_process` next to the server, reachable from this machine only.

    amqtt speaks MQTT 3.1.1 only and forgets messages in flight when a link breaks; fedzo's outboxes send those again.
    It takes about ten times the CPU of mosquitto per message, so it is for demos, tests and small fleets.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 1883,
        *,
        credentials: Credentials | None = None,
        tls: ServerTls | None = None,
    ) -> None:
        """Prepare; nothing is started.

        Args:
            host: A loopback address.
            port: Port to listen at; 0 chooses a free one at the first start.
            credentials: Logins and rights; None lets everybody on this machine in.
            tls: Makes it a TLS listener. With a CA for clients each must show a certificate with its own name, the
                server too, which shows the broker's.
        """
        self._host = host
        self._port = port
        self._child: ChildBroker | None = None
        self.credentials = credentials
        self.login = credentials.server if credentials else None
        self._server_tls = tls
        self.tls = tls.own_client() if tls else None
        self.url = ""
        rights = "passwords and topic rights" if credentials else "no passwords"
        self.description = (
            f"embedded amqtt: this machine only, {rights}, MQTT 3.1.1, {'' if tls else 'no '}TLS, forgets everything "
            "when it stops; for boards install mosquitto"
        )

    @property
    def port(self) -> int:
        """Port for the devices; known after the first start."""
        return self._port

    @property
    def pid(self) -> int | None:
        """Process id of the broker."""
        return self._child.pid if self._child else None

    def start(self) -> None:
        """Start the process; see `Broker.start`."""
        if self._child is not None:
            return
        self._port = choose_port(self._host, self._port)
        scheme = "mqtts" if self._server_tls else "mqtt"
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"{scheme}://{host}:{self._port}"
        program = [sys.executable, "-m", f"{__package__}.amqtt_process", self._host, str(self._port)]
        child = ChildBroker(program, name="the embedded broker", host=self._host, port=self._port)
        try:
            child.start(self._settings())
        except BrokerError as error:
            if "No module named 'amqtt'" in error.message:
                raise BrokerError(
                    "the embedded broker needs amqtt, which is not installed",
                    hint="pip install 'fedzo[server]', or: sudo apt install mosquitto",
                ) from None
            raise
        self._child = child

    def stop(self) -> None:
        """Stop the process."""
        if self._child is not None:
            self._child.stop()
            self._child = None

    def alive(self) -> bool:
        """Whether clients can connect now."""
        return self._child is not None and self._child.alive()

    def failure(self) -> str | None:
        """Say how the process died for good."""
        return self._child.failure() if self._child else None

    def update_credentials(self, credentials: Credentials) -> bool:
        """Take over new logins and the revocation list; see `Broker.update_credentials`."""
        if self.credentials is None:
            raise ConfigError("this broker was started without credentials; restart it with them")
        self.credentials = credentials
        if self._child is not None:
            self._child.replace_input(self._settings())
        return True

    def _settings(self) -> bytes:
        """One line of JSON for the child's standard input: passwords must not show up in the process list."""
        tls = self._server_tls
        document = {
            "credentials": self.credentials.to_document() if self.credentials else None,
            "tls": tls
            and {
                "certificate": str(tls.certificate),
                "key": str(tls.key),
                "ca": str(tls.client_ca or ""),
                "revoked": str(tls.revoked or ""),
            },
        }
        return json.dumps(document).encode() + b"\n"

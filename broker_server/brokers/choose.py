"""From what the user asked for to a broker."""

from __future__ import annotations

import importlib.util
import ipaddress
from dataclasses import replace
from pathlib import Path

from ...edge_runtime.connection.endpoint import TlsConfig
from ...protocol.errors import BrokerError, ConfigError
from .base import Broker
from .credentials import Credentials, Login
from .embedded import EmbeddedBroker
from .external import ExternalBroker
from .mosquitto import MosquittoBroker, find_mosquitto
from .server_tls import ServerTls

__all__ = ["open_broker"]


def open_broker(
    spec: str = "auto",
    host: str = "127.0.0.1",
    port: int = 1883,
    *,
    credentials: Credentials | None = None,
    server_tls: ServerTls | None = None,
    login: Login | None = None,
    tls: TlsConfig | None = None,
    client_id: str = "",
    folder: Path | None = None,
) -> Broker:
    """Choose a broker; it is not started yet.

    Args:
        spec: ``auto`` (mosquitto when it is installed, else embedded), ``mosquitto``, ``embedded``, or the URL of a
            broker that runs already.
        host: Address that an own broker listens at.
        port: Its port; 0 chooses a free one.
        credentials: Logins and rights of an own broker.
        server_tls: TLS files of an own broker.
        login: Login of the server at an external broker.
        tls: TLS files to trust an external broker with; a certificate of `server_tls` is shown to it all the same.
        client_id: MQTT client id of the server at an external broker.
        folder: Where an own broker may keep private files while it runs; the temporary folder by default.

    Raises:
        ConfigError: `spec` is none of these, or asks for something that this broker cannot do.
        BrokerError: The broker is not installed.
    """
    if "://" in spec:
        if login is None and credentials is not None:
            login = credentials.server
        if server_tls is not None and spec.startswith("mqtts:"):
            own = server_tls.own_client()
            tls = own if tls is None else replace(own, ca=tls.ca)
        return ExternalBroker(spec, login=login, tls=tls, client_id=client_id)
    if spec not in ("auto", "embedded", "mosquitto"):
        raise ConfigError(
            f"unknown broker {spec!r}", hint="use auto, mosquitto, embedded, mqtt://HOST:PORT or mqtts://HOST:PORT"
        )
    if login is not None or tls is not None:
        raise ConfigError(
            f"a login or a CA file for the broker {spec}, which fedzo starts itself",
            hint="use --credentials for logins and TLS of its own, or --broker URL for one that runs already",
        )
    if spec == "mosquitto" or (spec == "auto" and find_mosquitto() is not None):
        return MosquittoBroker(host, port, credentials=credentials, tls=server_tls, folder=folder)
    hint = "sudo apt install mosquitto, or use --broker mqtt://HOST:PORT"
    if not _is_loopback(host):
        problem = f"the embedded broker listens on loopback only, not on {host}"
        raise BrokerError(problem if spec == "embedded" else f"mosquitto is not installed, and {problem}", hint=hint)
    if importlib.util.find_spec("amqtt") is None:
        raise BrokerError(
            "the embedded broker needs amqtt, which is not installed"
            if spec == "embedded"
            else "neither mosquitto nor amqtt is installed",
            hint="sudo apt install mosquitto, or: pip install 'fedzo[server]'",
        )
    return EmbeddedBroker(host, port, credentials=credentials, tls=server_tls)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""TLS: trust, client certificates, and mistakes that people make with both."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedzo.broker_server.brokers.mosquitto import MosquittoBroker, ServerTls
from fedzo.edge_runtime.connection.endpoint import TlsConfig
from fedzo.edge_runtime.connection.transport import (
    Arrived,
    MqttTransport,
)
from fedzo.protocol.errors import BrokerError, ConfigError
from tests.broker_fixtures import Client, RunningBroker, needs_mosquitto

Connect = Callable[..., Client]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, and broker.pem, device.pem, stranger.pem (signed by itself) with their .key files."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("certificates")

    def run(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], check=True, cwd=folder, capture_output=True)

    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")  # which Python 3.13 insists on
    run(*new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test CA", *usage)
    run(*new, "-keyout", "stranger.key", "-out", "stranger.pem", "-subj", "/CN=stranger")
    for name in ("broker", "device"):
        run(*new, "-CA", "ca.pem", "-CAkey", "ca.key", "-keyout", f"{name}.key", "-out", f"{name}.pem",
            "-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost",
            "-addext", "basicConstraints=CA:FALSE")  # fmt: skip
    run("ec", "-in", "device.key", "-aes128", "-passout", "pass:secret", "-out", "locked.key")
    return folder


def tls_url(broker: MosquittoBroker, host: str = "localhost") -> str:
    return f"mqtts://{host}:{broker.port}"


@needs_mosquitto
def test_tls_and_client_certificates(certificates: Path, connect: Connect) -> None:
    ca = certificates / "ca.pem"
    server = ServerTls(certificates / "broker.pem", certificates / "broker.key", client_ca=ca)
    own = TlsConfig(ca, certificates / "device.pem", certificates / "device.key")
    with MosquittoBroker(port=0, tls=server) as broker:
        device = connect(tls_url(broker), "device", tls=own, subscriptions=["f/block"])
        local = connect(broker.url, "server")  # in plain text, on loopback
        local.transport.publish("f/block", bytes(100_000))
        assert device.wait(Arrived).payload == bytes(100_000)
        stranger = TlsConfig(ca, certificates / "stranger.pem", certificates / "stranger.key")
        for files in (TlsConfig(ca), stranger):
            transport = MqttTransport(tls_url(broker), "x", tls=files, on_event=lambda event: None)
            with pytest.raises(BrokerError) as caught:
                transport.connect(2.0)
            assert "TLS: " in caught.value.message or "the broker closed it" in caught.value.message
            assert caught.value.hint == (
                "the broker may have refused or revoked this certificate; "
                "a device gets a new one from: fedzo credentials issue x"
            )


@needs_mosquitto
@pytest.mark.parametrize(
    ("ca", "host", "words"),
    [
        ("stranger.pem", "localhost", "certificate is not trusted: "),
        (None, "localhost", "certificate is not trusted: "),
        ("ca.pem", "127.0.0.1", "IP address mismatch"),
    ],
)
def test_a_certificate_that_is_not_trusted_fails_at_once(
    ca: str | None, host: str, words: str, certificates: Path
) -> None:
    server = ServerTls(certificates / "broker.pem", certificates / "broker.key")
    with MosquittoBroker(port=0, tls=server) as broker:
        tls = TlsConfig(certificates / ca) if ca else None
        transport = MqttTransport(tls_url(broker, host), "x", tls=tls, on_event=lambda event: None)
        started = time.monotonic()
        with pytest.raises(BrokerError, match=words) as caught:
            transport.connect(20.0)
        assert time.monotonic() - started < 5.0
        assert "CA" in caught.value.hint


@needs_mosquitto
def test_tls_and_plain_text_mixed_up_is_explained(certificates: Path, mosquitto: RunningBroker) -> None:
    transport = MqttTransport(mosquitto.url.replace("mqtt:", "mqtts:"), "x", on_event=lambda event: None)
    with pytest.raises(BrokerError) as caught:
        transport.connect(2.0)
    assert "mqtt" in caught.value.hint
    server = ServerTls(certificates / "broker.pem", certificates / "broker.key")
    with MosquittoBroker(port=0, tls=server) as broker:
        transport = MqttTransport(f"mqtt://127.0.0.1:{broker.port}", "x", on_event=lambda event: None)
        with pytest.raises(BrokerError) as caught:
            transport.connect(2.0)
        assert "mqtts://" in caught.value.hint


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"certificate": "device.pem"}, "the key is missing"),
        ({"key": "device.key"}, "the certificate is missing"),
        ({"ca": "nothing.pem"}, "nothing.pem does not exist"),
        ({"ca": "ca.key"}, "cannot load"),
        ({"certificate": "device.pem", "key": "broker.key"}, "cannot load"),
        ({"certificate": "device.pem", "key": "locked.key"}, "passphrase"),
    ],
)
def test_tls_files_that_do_not_fit(files: dict[str, str], words: str, certificates: Path) -> None:
    paths = {role: certificates / name for role, name in files.items()}
    with pytest.raises(ConfigError, match=words):
        TlsConfig(**paths).client_context()


def test_old_tls_is_not_spoken() -> None:
    assert TlsConfig().client_context().minimum_version >= ssl.TLSVersion.TLSv1_2

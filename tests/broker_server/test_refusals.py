"""A stranger, a device that tries other devices' topics and a device whose certificate was revoked get nothing.

Against the real Mosquitto and the embedded broker, with TLS and certificates, as ``fedzo serve --credentials`` runs
them. What a refused client tries is watched from the server's side: nothing of it may arrive, nor reach the client.
"""

from __future__ import annotations

import dataclasses
import shutil
import socket
import ssl
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fedzo.broker_server.brokers.base import Broker
from fedzo.broker_server.brokers.credentials import SERVER_NAME
from fedzo.broker_server.brokers.embedded import EmbeddedBroker
from fedzo.broker_server.brokers.external import ExternalBroker
from fedzo.broker_server.brokers.mosquitto import MosquittoBroker, find_mosquitto
from fedzo.broker_server.security.certificates import Authority
from fedzo.broker_server.security.credential_folder import MOSQUITTO_PLACE, TLS_PORT, CredentialFolder
from fedzo.edge_runtime.connection.endpoint import TlsConfig
from fedzo.edge_runtime.connection.transport import Arrived, Delivered, Disconnected, MqttTransport, Will
from fedzo.edge_runtime.installation.device_bundle import DeviceBundle
from fedzo.protocol.errors import BrokerError
from fedzo.protocol.wire.topics import FROM_DEVICE, Channel, device_subscriptions, topic
from tests.broker_fixtures import Client, Proxy, needs_mosquitto, wait_until

Connect = Callable[..., Client]
EVERYTHING = "fedzo/v1/farm/#"


class Farm:
    """A broker with credentials, its server and bundles of two devices, one and two."""

    def __init__(self, folder: CredentialFolder, broker: Broker, connect: Connect) -> None:
        self.folder, self.broker, self._connect = folder, broker, connect
        self.port = broker.port if isinstance(broker, (MosquittoBroker, EmbeddedBroker)) else TLS_PORT
        self.url = f"mqtts://localhost:{self.port}"
        self.one, self.two = (DeviceBundle.load(folder.path / "devices" / name) for name in ("dev-1", "dev-2"))
        login = broker.login
        assert login is not None
        self.server = connect(
            broker.url, SERVER_NAME, username=login.username, password=login.password, tls=broker.tls,
            subscriptions=[EVERYTHING],
        )  # fmt: skip

    def device(self, bundle: DeviceBundle, url: str = "", **settings: object) -> Client:
        values = {"username": bundle.device, "password": bundle.password, "tls": bundle.tls} | settings
        return self._connect(url or self.url, bundle.device, **values)

    def is_refused(self, url: str, name: str, **settings: object) -> bool:
        """Whether a client gets no connection; what TLS refuses it tries again and again."""
        transport = MqttTransport(url, name, on_event=lambda event: None, **settings)  # type: ignore[arg-type]  # tests
        try:
            transport.connect(2.0)
        except BrokerError:
            return True
        transport.close()
        return False

    def heard(self) -> list[tuple[str, bytes]]:
        """What has reached the server; a message of its own marks the end."""
        mark = topic("farm", Channel.SERVER)
        self.server.transport.publish(mark, b"mark")
        found: list[tuple[str, bytes]] = []
        while True:
            event = self.server.wait(Arrived)
            if (event.topic, event.payload) == (mark, b"mark"):
                return found
            found.append((event.topic, event.payload))


@pytest.fixture(params=[pytest.param("mosquitto", marks=needs_mosquitto), "embedded"])
def farm(request: pytest.FixtureRequest, tmp_path: Path, connect: Connect) -> Iterator[Farm]:
    folder = CredentialFolder.create(tmp_path / "credentials", federation="farm", hosts=["localhost"])
    folder.issue(["dev-1", "dev-2"])
    kind = {"mosquitto": MosquittoBroker, "embedded": EmbeddedBroker}[request.param]
    with kind(port=0, credentials=folder.registry.credentials(), tls=folder.server_tls) as broker:
        yield Farm(folder, broker, connect)


def test_who_belongs_there_gets_through(farm: Farm) -> None:
    device = farm.device(farm.one, subscriptions=device_subscriptions("farm", "dev-1"))
    for channel in FROM_DEVICE:
        name = topic("farm", channel, "dev-1")
        device.wait(Delivered, message_id=device.transport.publish(name, channel.value.encode()))
    assert farm.heard() == [(topic("farm", channel, "dev-1"), channel.value.encode()) for channel in FROM_DEVICE]
    farm.server.transport.publish(topic("farm", Channel.ACK, "dev-1"), b"receipt")
    assert device.wait(Arrived, payload=b"receipt").topic == topic("farm", Channel.ACK, "dev-1")


# ---------------------------------------------------------------------- a stranger


def other_authority(folder: Path) -> TlsConfig:
    """A certificate in the name of dev-1 that an authority of the same name has signed."""
    authority, _ = Authority.create("fedzo farm")
    issued = authority.issue("dev-1", days=1)
    for name, data in (("x.pem", issued.certificate), ("x.key", issued.key)):
        (folder / name).write_bytes(data)
    return TlsConfig(None, folder / "x.pem", folder / "x.key")


@pytest.mark.parametrize(
    "who", ["plain text", "no certificate", "another authority", "password only", "certificate only"]
)
def test_a_stranger_gets_nothing(farm: Farm, who: str, tmp_path: Path) -> None:
    password = farm.one.password
    if who == "plain text":
        url = f"mqtt://localhost:{farm.port}"
        values: dict[str, object] = {"username": "dev-1", "password": password}
    else:
        ca = farm.one.tls.ca
        tls = {
            "no certificate": TlsConfig(ca),
            "password only": TlsConfig(ca),
            "another authority": dataclasses.replace(other_authority(tmp_path), ca=ca),
            "certificate only": farm.one.tls,
        }[who]
        values = {"tls": tls, "username": "dev-1"} | ({"password": password} if who != "certificate only" else {})
        url = farm.url
    will = Will(topic("farm", Channel.STATE, "dev-1"), b"from nowhere")
    assert farm.is_refused(url, "dev-1", subscriptions=[EVERYTHING], will=will, **values)
    assert farm.heard() == []


def test_bytes_without_tls_get_nothing_out_of_the_port(farm: Farm) -> None:
    with socket.create_connection(("127.0.0.1", farm.port), timeout=10) as link:
        link.sendall(b"\x10\x11\x00\x04MQTT\x04\x02\x00\x3c\x00\x05dev-1")
        got = b""
        with suppress(OSError):
            got = link.recv(100)
    assert got[:1] != b"\x20", "a CONNACK"


def test_old_tls_is_refused(farm: Farm) -> None:
    context = farm.one.tls.client_context()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with (
        socket.create_connection(("127.0.0.1", farm.port), timeout=10) as link,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(link, server_hostname="localhost")


# ---------------------------------------------------------------------- a device and other devices' topics


OTHERS = [
    *(topic("farm", channel, "dev-2") for channel in FROM_DEVICE),
    *(topic("farm", channel) for channel in (Channel.RUN, Channel.HEAD, Channel.LOG, Channel.SERVER)),
    topic("farm", Channel.COMMAND, "dev-2"),
    topic("farm", Channel.COMMAND, "dev-1"),  # what the server tells it, it must not tell itself
    "fedzo/v1/farm/d/dev-1/other",
    "fedzo/v1/farm/d/dev-1/report/more",
    "fedzo/v1/other/d/dev-1/report",
    "elsewhere",
]


def test_a_device_publishes_under_its_own_id_only(farm: Farm) -> None:
    device = farm.device(farm.one)
    for name in OTHERS:
        device.transport.publish(name, b"forged", retain=True)
        with suppress(AssertionError):  # amqtt ends the link of some, and the transport comes back
            device.wait(Delivered, timeout_s=0.2)
    wait_until(lambda: device.transport.connected)
    device.wait(Delivered, message_id=device.transport.publish(topic("farm", Channel.HELLO, "dev-1"), b"mine"))
    assert [(name, payload) for name, payload in farm.heard() if payload == b"forged"] == []


def test_a_device_hears_what_is_meant_for_it_only(farm: Farm) -> None:
    spied = [topic("farm", channel, "dev-2") for channel in (Channel.ACK, Channel.BLOCK, Channel.COMMAND, *FROM_DEVICE)]
    patterns = (EVERYTHING, "#", "fedzo/v1/+/s/+/ack", "fedzo/v1/farm/d/dev-2/+", "$SYS/#", *spied)
    own = farm.device(farm.one, subscriptions=[topic("farm", Channel.ACK, "dev-1")])
    farm.server.transport.publish(topic("farm", Channel.ACK, "dev-1"), b"its own")
    assert own.wait(Arrived).payload == b"its own"
    own.transport.close()
    spies = []
    for pattern in patterns:
        with suppress(BrokerError):  # Mosquitto grants the subscription and delivers nothing; amqtt refuses it.
            spies.append(farm.device(farm.one, subscriptions=[pattern]))
            spies[-1].idle(0.05)
            for name in spied:
                farm.server.transport.publish(name, b"secret", retain=name.endswith("state"))
            events = [event for event in spies[-1].idle(0.2) if isinstance(event, Arrived)]
            assert events == [], pattern
            spies[-1].transport.close()
    assert len(spies) == len(patterns) or isinstance(farm.broker, EmbeddedBroker)
    assert farm.broker.alive()


@pytest.mark.parametrize("name", [topic("farm", Channel.STATE, "dev-2"), topic("farm", Channel.HEAD)])
def test_a_devices_will_is_its_own(farm: Farm, name: str) -> None:
    relay = Proxy(("127.0.0.1", farm.port))
    try:
        with suppress(BrokerError):  # refused at once by amqtt, not published by Mosquitto
            url = relay.url.replace("mqtt://127.0.0.1", "mqtts://localhost")
            farm.device(farm.one, url, will=Will(name, b"forged"))
            relay.cut()
            time.sleep(0.3)
        assert (name, b"forged") not in farm.heard()
    finally:
        relay.close()


def test_a_device_cannot_be_another_one(farm: Farm, connect: Connect) -> None:
    """Neither with the other's name and its own password, nor by the client id."""
    two = farm.device(farm.two)
    with pytest.raises(BrokerError):
        connect(farm.url, "dev-2", username="dev-2", password=farm.one.password, tls=farm.one.tls)
    with suppress(BrokerError):  # Mosquitto gives it its own session, amqtt refuses
        connect(farm.url, "dev-2", username="dev-1", password=farm.one.password, tls=farm.one.tls)
    assert not [event for event in two.idle() if isinstance(event, Disconnected)]


# ---------------------------------------------------------------------- a revoked certificate


def test_a_revoked_device_is_cut_off_and_gets_nothing(farm: Farm) -> None:
    will = Will(topic("farm", Channel.STATE, "dev-2"), b"forged")
    one = farm.device(farm.one, subscriptions=device_subscriptions("farm", "dev-1"))
    two = farm.device(farm.two, subscriptions=device_subscriptions("farm", "dev-2"))
    kept = {path.name: path.read_bytes() for path in farm.one.folder.iterdir()}
    farm.folder.revoke("dev-1")
    farm.one.folder.mkdir()
    for name, data in kept.items():  # the board still has its copy
        (farm.one.folder / name).write_bytes(data)
    farm.broker.update_credentials(farm.folder.registry.credentials())

    one.wait(Disconnected)
    wait_until(lambda: not one.transport.connected)
    farm.heard()
    for channel in (Channel.RUN, Channel.HEAD):
        farm.server.transport.publish(topic("farm", channel), b"for those who belong here", retain=True)
    farm.server.transport.publish(topic("farm", Channel.ACK, "dev-1"), b"secret")
    values = {"username": "dev-1", "password": farm.one.password, "tls": farm.one.tls}
    assert farm.is_refused(farm.url, "dev-1", subscriptions=device_subscriptions("farm", "dev-1"), will=will, **values)
    one.transport.publish(topic("farm", Channel.REPORT, "dev-1"), b"after")
    assert [event for event in one.idle(1.0) if isinstance(event, Arrived)] == []
    assert not [payload for name, payload in farm.heard() if "/dev-1/report" in name or payload == b"forged"]
    # The other one did not notice.
    two.wait(Arrived, payload=b"for those who belong here")
    assert not [event for event in two.seen if isinstance(event, Disconnected)]
    farm.folder.issue(["dev-1"])
    farm.broker.update_credentials(farm.folder.registry.credentials())
    new = DeviceBundle.load(farm.one.folder)

    def is_back() -> bool:
        return not farm.is_refused(farm.url, "dev-1", username="dev-1", password=new.password, tls=new.tls)

    wait_until(is_back)


@pytest.mark.parametrize("kind", [pytest.param(MosquittoBroker, marks=needs_mosquitto), EmbeddedBroker])
def test_a_revoked_certificate_fails_the_handshake(
    kind: type[MosquittoBroker | EmbeddedBroker], tmp_path: Path
) -> None:
    """Also with a password that is good: what was lost with a board is of no use with another's password."""
    folder = CredentialFolder.create(tmp_path / "credentials", federation="farm", hosts=["localhost"])
    folder.issue(["dev-1", "dev-2"])
    contexts = {n: DeviceBundle.load(folder.path / "devices" / n).tls.client_context() for n in ("dev-1", "dev-2")}
    with kind(port=0, credentials=folder.registry.credentials(), tls=folder.server_tls) as broker:

        def shakes_hands(name: str) -> bool:
            context = contexts[name]
            with socket.create_connection(("127.0.0.1", broker.port), timeout=10) as link:
                try:
                    with context.wrap_socket(link, server_hostname="localhost") as secured:
                        secured.settimeout(1.0)  # TLS 1.3: the refusal comes with the first read
                        return secured.recv(1) != b""
                except TimeoutError:
                    return True
                except (ssl.SSLError, ConnectionError):
                    return False

        assert shakes_hands("dev-1")
        folder.revoke("dev-1")
        broker.update_credentials(folder.registry.credentials())
        wait_until(lambda: not shakes_hands("dev-1"))
        assert shakes_hands("dev-2")
        folder.revoke("dev-2")  # within the second of the first list, perhaps
        broker.update_credentials(folder.registry.credentials())
        wait_until(lambda: not shakes_hands("dev-2"))
    with kind(port=0, credentials=folder.registry.credentials(), tls=folder.server_tls) as broker:
        wait_until(lambda: not shakes_hands("dev-1"))  # revoked before the broker's start


@pytest.mark.parametrize("farm", ["embedded"], indirect=True)  # for Mosquitto fedzo reads it, and says so itself
def test_a_list_that_cannot_be_read_leaves_the_embedded_broker_as_it_is(farm: Farm) -> None:
    farm.device(farm.one)
    (farm.folder.path / "revoked.pem").write_text("no list")
    farm.broker.update_credentials(farm.folder.registry.credentials())
    time.sleep(0.5)
    login: dict[str, object] = {"username": "dev-2", "password": farm.two.password, "tls": farm.two.tls}
    wait_until(lambda: not farm.is_refused(farm.url, "dev-2", **login))  # a busy machine takes longer than one try


@needs_mosquitto
def test_the_folder_for_somebody_elses_mosquitto_works(tmp_path: Path, connect: Connect) -> None:
    """As ``docs/security.md`` says: copy it, name it in the settings, and reload after changes."""
    folder = CredentialFolder.create(tmp_path / "credentials", federation="farm", hosts=["localhost"])
    folder.issue(["dev-1", "dev-2"])
    place = tmp_path / "etc"
    shutil.copytree(folder.path / "mosquitto", place)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = place / "conf.d" / "fedzo.conf"
    text = settings.read_text().replace(MOSQUITTO_PLACE, str(place)).replace(f"listener {TLS_PORT}", f"listener {port}")
    # Started by root it would read its files as another user, who has no rights here.
    settings.write_text(text + "user root\n")
    program = find_mosquitto()
    assert program is not None
    process = subprocess.Popen([program, "-c", str(settings)])
    try:
        credentials = folder.registry.credentials()
        external = ExternalBroker(
            f"mqtts://localhost:{port}", login=credentials.server, tls=folder.server_tls.own_client(),
            client_id="fedzo-server-farm",
        )  # fmt: skip
        wait_until(external.alive)
        external.start()
        external.update_credentials(credentials)
        farm = Farm(folder, external, connect)
        farm.url = external.url
        device = farm.device(farm.one)
        device.wait(Delivered, message_id=device.transport.publish(topic("farm", Channel.HELLO, "dev-1"), b"hi"))
        device.transport.publish(topic("farm", Channel.HELLO, "dev-2"), b"forged")
        assert farm.heard() == [(topic("farm", Channel.HELLO, "dev-1"), b"hi")]
    finally:
        process.terminate()
        process.wait(10)

"""`fedzo broker check` against real brokers: whole ones, and ones that lack something on purpose."""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fedzo.broker_server.brokers import Credentials
from fedzo.broker_server.brokers.check import BrokerCheck, Finding, verdict
from fedzo.broker_server.brokers.embedded import EmbeddedBroker
from fedzo.broker_server.brokers.mosquitto import MosquittoBroker, find_mosquitto
from fedzo.broker_server.security.credential_folder import CredentialFolder
from fedzo.cli.main import main
from fedzo.edge_runtime.connection.broker_check import BrokerAccess
from fedzo.edge_runtime.connection.transport import Arrived, Delivered
from fedzo.protocol.errors import BrokerError
from tests.broker_fixtures import Client, needs_mosquitto

Connect = Callable[..., Client]


@contextmanager
def mosquitto_with(*lines: str) -> Iterator[str]:
    """A mosquitto with a configuration of its own; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        config = Path(folder) / "mosquitto.conf"
        config.write_text("\n".join([f"listener {port} 127.0.0.1", *lines]) + "\n")
        if not any(line.startswith("allow_anonymous") for line in lines):
            config.write_text(config.read_text() + "allow_anonymous true\n")
        for path in (Path(folder), config):
            path.chmod(0o755)
        process = subprocess.Popen(
            [str(find_mosquitto()), "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + 60
            while True:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                assert process.poll() is None, f"mosquitto does not take {lines}"
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield f"mqtt://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def check(url: str, **settings: object) -> dict[str, Finding]:
    """All findings by name."""
    access = {name: settings.pop(name) for name in ("username", "password_file") if name in settings}
    if "device" in settings:
        secret = settings.pop("device_password_file")
        settings["device"] = BrokerAccess(url, device=settings["device"], password_file=secret)  # type: ignore[arg-type]
    found = list(BrokerCheck(BrokerAccess(url, **access), **settings).findings())  # type: ignore[arg-type]
    assert len({finding.name for finding in found}) == len(found)
    return {finding.name: finding for finding in found}


def statuses(findings: dict[str, Finding], status: str) -> set[str]:
    return {name for name, finding in findings.items() if finding.status == status}


@needs_mosquitto
def test_the_recommended_broker_has_everything_and_nothing_is_left_in_it(connect: Connect) -> None:
    with MosquittoBroker(port=0, max_queued_messages=10_000) as broker:
        found = check(broker.url)
        assert statuses(found, "warn") == {"strangers"}, found
        assert not statuses(found, "fail") | statuses(found, "skip")
        assert found["protocol"].detail == "MQTT 5"
        assert found["window"].detail.startswith("400 unacknowledged")
        verdict(list(found.values()))
        witness = connect(broker.url, "witness", subscriptions=["#"])
        assert not [event for event in witness.idle() if isinstance(event, Arrived)]


@needs_mosquitto
def test_mosquitto_as_installed_is_enough_for_few_boards_only() -> None:
    with mosquitto_with() as url:
        found = check(url, devices=300, probes=("session",))
    assert not statuses(found, "fail")
    assert {"window", "queue"} <= statuses(found, "warn")
    assert found["window"].detail.startswith("at most 20 ")
    assert found["queue"].detail.startswith("1000 of 1200")
    assert "max_queued_messages" in found["queue"].hint


@needs_mosquitto
@pytest.mark.parametrize(
    ("line", "probe", "name", "status", "words"),
    [
        ("retain_available false", "retained messages", "retained messages", "fail", "retain"),
        ("max_packet_size 20000", "large messages", "large messages", "fail", "announces 20000 bytes"),
        ("max_packet_size 150000", "large messages", "large messages", "warn", "announces 150000 bytes"),
        ("max_qos 0", "QoS 1", "QoS 1", "fail", "granted as QoS 0"),
    ],
)
def test_what_a_crippled_mosquitto_lacks_is_named(line: str, probe: str, name: str, status: str, words: str) -> None:
    with mosquitto_with("max_queued_messages 10000", "max_inflight_messages 500", line) as url:
        found = check(url, probes=(probe,))
    assert found[name].status == status, found
    assert words in found[name].detail.lower() or words in found[name].detail
    assert found[name].hint
    if status == "fail":
        with pytest.raises(BrokerError, match=name) as caught:
            verdict(list(found.values()))
        assert caught.value.exit_code == 5


@needs_mosquitto
def test_a_broker_that_forgets_sessions_is_noticed() -> None:
    with mosquitto_with() as url, forgetful(url) as relayed:
        found = check(relayed, probes=("session",))
    assert found["session"].status == "warn"
    assert not statuses(found, "fail")


@contextmanager
def forgetful(url: str) -> Iterator[str]:
    """A relay that makes every client start clean, whatever it asks for: MQTT 5.0, section 3.1.2.4."""
    host, _, port = url.removeprefix("mqtt://").rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))
    links: list[socket.socket] = []

    def pass_on(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((host, int(port)))
                links.extend((client, server))
                first = bytearray(client.recv(65_536))
                if first:
                    first[first.index(b"MQTT") + 5] |= 0x02
                    server.sendall(first)
                threading.Thread(target=pass_on, args=(client, server), daemon=True).start()
                threading.Thread(target=pass_on, args=(server, client), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"mqtt://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for link in links:
            link.close()


def test_the_embedded_broker_has_what_is_needed_and_loses_what_was_in_flight() -> None:
    with EmbeddedBroker(port=0) as broker:
        found = check(broker.url)
    assert not statuses(found, "fail"), found
    assert found["protocol"].detail.startswith("MQTT 3.1.1")
    assert found["redelivery"].status == "warn", found
    assert found["keep-alive"].status == "ok", found


@needs_mosquitto
def test_rights_of_server_and_device(tmp_path: Path) -> None:
    credentials = Credentials.generate("default", ["dev-1"])
    server, device = tmp_path / "server", tmp_path / "device"
    server.write_text(credentials.server.password)
    device.write_text(credentials.devices[0].password)
    with MosquittoBroker(port=0, credentials=credentials) as broker:
        found = check(
            broker.url,
            username=credentials.server.username,
            password_file=server,
            device="dev-1",
            device_password_file=device,
            probes=("QoS 1", "retained messages", "will", "session"),
        )
        assert not statuses(found, "fail"), found
        assert found["strangers"].status == "ok"
        assert found["client ids"].detail == "bound to the login"
        assert statuses(found, "skip") == {"session"}
        assert {name for name in statuses(found, "ok") if name.startswith("rights")} == {
            "rights: own topics",
            "rights: foreign voices",
            "rights: foreign ears",
            "rights: foreign wills",
        }
        # A device's login is not enough for the check itself, and it says so.
        found = check(broker.url, username="dev-1", password_file=device, probes=("QoS 1",))
        assert found["QoS 1"].status == "fail"
        assert "let this login read and write" in found["QoS 1"].hint


@needs_mosquitto
def test_passwords_without_topic_rights_are_not_enough(tmp_path: Path) -> None:
    credentials = Credentials.generate("default", ["dev-1"])
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        passwords = Path(folder) / "passwords"
        passwords.write_text(credentials.mosquitto_password_file())
        passwords.chmod(0o644)
        server, device = tmp_path / "server", tmp_path / "device"
        server.write_text(credentials.server.password)
        device.write_text(credentials.devices[0].password)
        with mosquitto_with("allow_anonymous false", f"password_file {passwords}") as url:
            settings = {
                "username": credentials.server.username,
                "password_file": server,
                "device": "dev-1",
                "device_password_file": device,
                "probes": ("QoS 1",),
            }
            found = check(url, **settings)
            device.write_text("wrong")
            wrong = check(url, **settings)
    assert {"client ids", "rights: foreign voices", "rights: foreign ears", "rights: foreign wills"} <= statuses(
        found, "warn"
    )
    assert wrong["rights: own topics"].status == "fail"


@needs_mosquitto
def test_a_login_with_a_session_is_left_alone(tmp_path: Path, connect: Connect) -> None:
    credentials = Credentials.generate("default", ["dev-1"])
    login, device = credentials.server, credentials.devices[0]
    secret = tmp_path / "server"
    secret.write_text(login.password)
    with MosquittoBroker(port=0, credentials=credentials) as broker:

        def server() -> Client:
            return connect(
                broker.url, login.username, username=login.username, password=login.password,
                subscriptions=["fedzo/v1/default/d/+/report"], clean_start=False, session_expiry_s=86_400,
                manual_ack=True,
            )  # fmt: skip

        server().transport.close()
        one = connect(broker.url, "dev-1", username="dev-1", password=device.password)
        one.wait(Delivered, message_id=one.transport.publish("fedzo/v1/default/d/dev-1/report", b"while away"))
        with pytest.raises(BrokerError, match="session of the login 'fedzo-server'") as caught:
            check(broker.url, username=login.username, password_file=secret)
        assert "login of its own" in caught.value.hint
        assert server().wait(Arrived).payload == b"while away"


@needs_mosquitto
def test_a_check_that_is_interrupted_leaves_nothing_either(connect: Connect) -> None:
    with mosquitto_with("sys_interval 1") as url:
        findings = BrokerCheck(BrokerAccess(url), 10, probes=("retained messages", "session")).findings()
        for finding in findings:
            if finding.name == "redelivery":
                break
        findings.close()  # type: ignore[attr-defined]
        witness = connect(url, "witness", subscriptions=["fedzo/#", "$SYS/broker/clients/disconnected"])
        arrived = [event for event in witness.idle(2.5) if isinstance(event, Arrived)]
    assert {event.topic for event in arrived} == {"$SYS/broker/clients/disconnected"}
    assert arrived[-1].payload == b"0"  # no session either


@needs_mosquitto
def test_the_command_prints_a_table_or_json_and_its_exit_code_tells(capsys: pytest.CaptureFixture[str]) -> None:
    with mosquitto_with("retain_available false") as url:
        assert main(["broker", "check", url, "--json", "--devices", "10"]) == 5
        out = capsys.readouterr()
        answer = json.loads(out.out)
        assert answer["url"] == url
        failed = [finding for finding in answer["findings"] if finding["status"] == "fail"]
        assert [finding["name"] for finding in failed] == ["retained messages"]
        assert "retained messages" in out.err
    assert main(["broker", "check", url, "--timeout", "1"]) == 5
    assert "no connection" in capsys.readouterr().err


@needs_mosquitto
def test_the_folders_of_fedzo_credentials_are_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedzo.broker_server.brokers.probes.SILENCE_S", 0.5)  # others look at the keep-alive
    folder = CredentialFolder.create(tmp_path / "credentials", federation="default", hosts=["localhost"])
    folder.issue(["kitchen"])
    with MosquittoBroker(port=0, credentials=folder.registry.credentials(), tls=folder.server_tls) as broker:
        url = f"mqtts://localhost:{broker.port}"
        device = folder.path / "devices" / "kitchen"
        arguments = ["--credentials", str(folder.path), "--device-credentials", str(device), "--json"]
        assert main(["broker", "check", url, "--devices", "10", *arguments]) == 0
        found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
        assert found["TLS"]["status"] == "ok"
        assert "the certificate is valid for 82" in found["TLS"]["detail"]
        assert found["strangers"]["status"] == found["client ids"]["status"] == "ok"
        assert all(found[name]["status"] == "ok" for name in found if name.startswith("rights"))
        assert main(["broker", "check", url, "--timeout", "3"]) == 5  # without the authority's certificate
        assert "certificate" in capsys.readouterr().err
    assert main(["broker", "check", url, "--credentials", str(folder.path), "--ca", "x"]) == 3


def test_wrong_settings_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["http://x"],
        ["mqtt://127.0.0.1", "--devices", "0"],
        ["mqtt://127.0.0.1", "--id", "A B"],
        ["mqtt://x", "--credentials", "/none"],
        ["mqtt://127.0.0.1:1", "--id", "dev-1"],
        ["mqtt://127.0.0.1:1", "--device-password-file", "/none"],
        ["mqtt://127.0.0.1:1", "--device-credentials", "/none", "--id", "dev-1"],
        ["mqtt://127.0.0.1:1", "--device-credentials", "/none", "--device-password-file", "/none"],
    ):
        assert main(["broker", "check", *arguments]) == 3
        assert "error:" in capsys.readouterr().err

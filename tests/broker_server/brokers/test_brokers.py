"""One contract for every broker: what the protocol needs from MQTT, and how brokers start, fail and stop."""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fedzo.broker_server.brokers import Credentials, open_broker
from fedzo.broker_server.brokers import choose as choose_module
from fedzo.broker_server.brokers import mosquitto as mosquitto_module
from fedzo.broker_server.brokers.credentials import Login
from fedzo.broker_server.brokers.embedded import EmbeddedBroker
from fedzo.broker_server.brokers.external import ExternalBroker
from fedzo.broker_server.brokers.mosquitto import MosquittoBroker, find_mosquitto
from fedzo.broker_server.brokers.private_files import PrivateFolder
from fedzo.broker_server.brokers.server_tls import ServerTls
from fedzo.cli.serve_access import ServeAccess
from fedzo.cli.serve_settings import ServeSettings
from fedzo.edge_runtime.connection.endpoint import TlsConfig
from fedzo.edge_runtime.connection.transport import (
    Arrived,
    Connected,
    Delivered,
    Disconnected,
    Publication,
    Rejected,
    Will,
)
from fedzo.protocol.errors import BrokerError, ConfigError, FedzoError
from fedzo.protocol.wire.framing import MAX_PAYLOAD_BYTES
from tests.broker_fixtures import Client, Proxy, RunningBroker, needs_mosquitto, wait_until

Connect = Callable[..., Client]
OWN = [pytest.param(MosquittoBroker, marks=needs_mosquitto), EmbeddedBroker]


# ---------------------------------------------------------------------- what the protocol needs


def test_a_qos_1_message_goes_round(broker: RunningBroker, connect: Connect) -> None:
    listener = connect(broker.url, "listener", subscriptions=["a/+/report"])
    speaker = connect(broker.url, "speaker")
    message_id = speaker.transport.publish("a/b/report", b"\x00payload\xff")
    speaker.wait(Delivered, message_id=message_id)
    arrived = listener.wait(Arrived)
    assert (arrived.topic, arrived.payload, arrived.retain) == ("a/b/report", b"\x00payload\xff", False)


def test_an_exact_retained_topic_reaches_a_late_joiner(broker: RunningBroker, connect: Connect) -> None:
    speaker = connect(broker.url, "speaker")
    for payload in (b"old", b"new"):
        speaker.wait(Delivered, message_id=speaker.transport.publish("f/head", payload, retain=True))
    late = connect(broker.url, "late", subscriptions=["f/head", "f/other"])
    arrived = late.wait(Arrived)
    assert (arrived.topic, arrived.payload, arrived.retain) == ("f/head", b"new", True)
    # An empty retained message removes it.
    speaker.wait(Delivered, message_id=speaker.transport.publish("f/head", b"", retain=True))
    later = connect(broker.url, "later", subscriptions=["f/head"])
    assert not [event for event in later.idle() if isinstance(event, Arrived)]


def test_a_cut_link_publishes_the_will(broker: RunningBroker, proxy: Proxy, connect: Connect) -> None:
    listener = connect(broker.url, "listener", subscriptions=["f/d/dev/state"])
    device = connect(proxy.url, "dev", will=Will("f/d/dev/state", b"lost"))
    proxy.cut()
    assert listener.wait(Arrived).payload == b"lost"
    device.wait(Disconnected)
    late = connect(broker.url, "late", subscriptions=["f/d/dev/state"])
    assert late.wait(Arrived).retain, "the will was not kept for late joiners"


def test_a_silent_client_is_given_up_and_its_will_published(
    broker: RunningBroker, proxy: Proxy, connect: Connect
) -> None:
    listener = connect(broker.url, "listener", subscriptions=["f/state"])
    connect(proxy.url, "dev", will=Will("f/state", b"lost"), keepalive_s=1)
    proxy.frozen = True  # no packet, no FIN: a board without power
    assert listener.wait(Arrived, timeout_s=60.0).payload == b"lost"


def test_a_graceful_end_publishes_the_last_message_and_no_will(broker: RunningBroker, connect: Connect) -> None:
    listener = connect(broker.url, "listener", subscriptions=["f/state"])
    device = connect(broker.url, "dev", will=Will("f/state", b"lost"))
    device.transport.close(Publication("f/state", b"off", retain=True))
    events = [event.payload for event in listener.idle(0.5) if isinstance(event, Arrived)]
    assert events == [b"off"]


def test_clients_survive_a_restart_of_the_broker(broker: RunningBroker, connect: Connect) -> None:
    listener = connect(broker.url, "listener", subscriptions=["f/x"])
    speaker = connect(broker.url, "speaker")
    broker.stop()
    speaker.wait(Disconnected)
    listener.wait(Disconnected)
    offline = [speaker.transport.publish("f/y", b"%d" % n) for n in range(5)]
    broker.start()
    again = listener.wait(Connected)
    assert again.generation == 2
    assert not again.session_present
    speaker.wait(Connected)
    for message_id in offline:
        speaker.wait(Delivered, message_id=message_id)
    wait_until(lambda: listener.transport.connected)
    speaker.transport.publish("f/x", b"after")
    assert listener.wait(Arrived).payload == b"after", "the subscription was not made again"


def test_what_waited_for_the_broker_arrives_once_and_in_order(
    broker: RunningBroker, proxy: Proxy, connect: Connect
) -> None:
    listener = connect(broker.url, "listener", subscriptions=["f/x"])
    speaker = connect(proxy.url, "speaker", max_inflight=1)
    proxy.refusing = True
    broker.stop()
    speaker.wait(Disconnected)
    last = [speaker.transport.publish("f/x", b"%d" % number) for number in range(20)][-1]
    broker.start()
    listener.wait(Connected)
    wait_until(lambda: listener.transport.connected)
    assert speaker.transport.is_pending(last)
    proxy.refusing = False
    assert [int(listener.wait(Arrived).payload) for _ in range(20)] == list(range(20))
    speaker.wait(Delivered, message_id=last)
    assert not speaker.transport.is_pending(last)


@needs_mosquitto
def test_mosquitto_takes_the_largest_message_and_no_larger_ones(connect: Connect) -> None:
    with MosquittoBroker(port=0) as broker:
        listener = connect(broker.url, "listener", subscriptions=["f/x"])
        speaker = connect(broker.url, "speaker")
        speaker.transport.publish("f/x", bytes(MAX_PAYLOAD_BYTES))
        assert len(listener.wait(Arrived).payload) == MAX_PAYLOAD_BYTES
        assert broker._folder is not None
        settings = (broker._folder.path / "mosquitto.conf").read_text().splitlines()
        assert f"max_packet_size {MAX_PAYLOAD_BYTES + 4096}" in settings
        assert f"max_queued_bytes {256 << 20}" in settings
        stranger = connect(broker.url, "stranger")
        # Announced to MQTT 5 clients, so that theirs is refused at once; others are disconnected.
        with suppress(FedzoError, ValueError):
            stranger.transport.publish("f/x", bytes(MAX_PAYLOAD_BYTES + 4096))
        assert not [event for event in listener.idle() if isinstance(event, Arrived)]


def test_the_embedded_broker_takes_the_same_packets_as_mosquitto(connect: Connect) -> None:
    with EmbeddedBroker(port=0) as broker:
        listener = connect(broker.url, "listener", subscriptions=["f/x"])
        speaker = connect(broker.url, "speaker")
        speaker.transport.publish("f/x", bytes(MAX_PAYLOAD_BYTES))
        assert len(listener.wait(Arrived).payload) == MAX_PAYLOAD_BYTES
        stranger = connect(broker.url, "stranger")
        stranger.transport.publish("f/x", bytes(MAX_PAYLOAD_BYTES + 8192))
        stranger.wait(Disconnected)
        assert not [event for event in listener.idle() if isinstance(event, Arrived)]


def test_links_in_the_brokers_folder_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, target = tmp_path / "folder", tmp_path / "target"
    folder.mkdir()
    target.touch()
    (folder / "file").touch()
    (folder / "link").symlink_to(target)
    (folder / "owner.lock").touch()
    given = list[tuple[Path, int, int, bool]]()

    def chown(path: Path, user: int, group: int, *, follow_symlinks: bool = True) -> None:
        given.append((path, user, group, follow_symlinks))

    monkeypatch.setattr(os, "chown", chown)
    own = pwd.getpwuid(os.getuid())
    mosquitto_module._give_to(own.pw_name, folder)
    assert given == [(folder / "file", own.pw_uid, -1, False), (folder, -1, own.pw_gid, True)]
    assert folder.stat().st_mode & 0o777 == 0o710


HARDENED = """
import os, sys
from pathlib import Path
from fedzo.broker_server.brokers import mosquitto
from fedzo.broker_server.brokers.credentials import Credentials
mosquitto._RUNTIME = Path(sys.argv[1])
credentials = Credentials.generate("default", ["dev-1"])
broker = mosquitto.MosquittoBroker(port=0, credentials=credentials)
try:
    broker.start()
    broker.update_credentials(credentials.with_devices(["dev-2"]))
    print(broker.alive())
except Exception as error:
    print(type(error).__name__, error)
finally:
    broker.stop()
"""


@needs_mosquitto
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
@pytest.mark.parametrize(
    ("capabilities", "said"),
    [
        ("-dac_override,-dac_read_search", "True"),
        ("-dac_override,-dac_read_search,-chown", "BrokerError cannot give the broker's files to the user"),
        ("-setuid,-setgid", "its last words: cannot run as the user "),
    ],
)
def test_root_that_may_not_do_everything(capabilities: str, said: str) -> None:
    """As in a hardened container; whatever comes of it, no file is left behind."""
    with tempfile.TemporaryDirectory(prefix="fedzo-test-run-") as runtime:
        Path(runtime).chmod(0o755)
        command = ["setpriv", f"--bounding-set={capabilities}", sys.executable, "-c", HARDENED, runtime]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert said in answer.stdout, answer
        assert list(Path(runtime).iterdir()) == []


def test_large_payloads(broker: RunningBroker, connect: Connect) -> None:
    listener = connect(broker.url, "listener", subscriptions=["f/block"])
    speaker = connect(broker.url, "speaker")
    blocks = [os.urandom(131_072) for _ in range(8)]
    for block in blocks:
        speaker.transport.publish("f/block", block)
    assert [listener.wait(Arrived).payload for _ in blocks] == blocks


def test_fifty_clients(broker: RunningBroker, connect: Connect) -> None:
    server = connect(
        broker.url, "server", subscriptions=["f/+/report"], manual_ack=True, max_inflight=100, clean_start=False
    )
    devices = [connect(broker.url, f"dev-{n}", subscriptions=["f/head"]) for n in range(50)]
    for number, device in enumerate(devices):
        for index in range(4):
            device.transport.publish(f"f/{number}/report", b"%d" % index)
    got = []
    for _ in range(200):
        arrived = server.wait(Arrived)
        got.append((arrived.topic, arrived.payload))
        assert arrived.token is not None
        assert server.transport.acknowledge(arrived.token)
    assert sorted(got) == sorted((f"f/{n}/report", b"%d" % i) for n in range(50) for i in range(4))
    server.transport.publish("f/head", b"next", retain=True)
    for device in devices:
        assert device.wait(Arrived).payload == b"next"


def test_the_client_speaks_the_best_version_the_broker_has(broker: RunningBroker, connect: Connect) -> None:
    client = connect(broker.url, "client")
    expected = "3.1.1" if isinstance(broker.broker, EmbeddedBroker) else "5"
    assert client.wait(Connected).protocol == expected


def test_stop_is_clean_and_idempotent(broker: RunningBroker) -> None:
    assert broker.broker.alive()
    assert broker.broker.failure() is None
    broker.stop()
    broker.stop()
    assert not broker.broker.alive()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(broker.address, timeout=1)
    broker.start()
    assert broker.broker.alive()


# ---------------------------------------------------------------------- rights


@pytest.mark.parametrize("kind", OWN)
def test_credentials_are_enforced(kind: type[MosquittoBroker | EmbeddedBroker], connect: Connect) -> None:
    credentials = Credentials.generate("farm", ["dev-1", "dev-2"])
    one, two = credentials.devices

    def device(login_name: str, password: str, **settings: object) -> Client:
        return connect(broker.url, login_name, username=login_name, password=password, **settings)

    with kind(port=0, credentials=credentials) as broker:
        assert broker.login == credentials.server
        server = device(
            credentials.server.username, credentials.server.password, subscriptions=["fedzo/v1/farm/d/+/report"]
        )
        for username, password in ((one.username, "wrong"), ("stranger", one.password), (one.username, two.password)):
            with pytest.raises(BrokerError, match="refused") as caught:
                device(username, password)
            assert password not in str(caught.value)
        with pytest.raises(BrokerError):
            connect(broker.url, "dev-1")

        first = device(one.username, one.password, subscriptions=["fedzo/v1/farm/head", "fedzo/v1/farm/s/dev-1/ack"])
        first.transport.publish("fedzo/v1/farm/d/dev-1/report", b"mine")
        assert server.wait(Arrived).payload == b"mine"
        # Neither another device's voice nor the server's.
        first.transport.publish("fedzo/v1/farm/d/dev-2/report", b"forged")
        first.transport.publish("fedzo/v1/farm/head", b"forged", retain=True)
        assert not [event for event in server.idle() if isinstance(event, Arrived)]
        assert not [event for event in first.idle() if isinstance(event, Arrived)]
        # Nor another device's ears. Mosquitto grants the subscription and sends nothing; amqtt refuses it.
        spy: Client | None = None
        with suppress(BrokerError):
            spy = device(two.username, two.password, subscriptions=["fedzo/v1/farm/s/dev-1/ack"])
        assert (spy is not None) == (kind is MosquittoBroker)
        server.transport.publish("fedzo/v1/farm/s/dev-1/ack", b"for one")
        assert first.wait(Arrived).payload == b"for one"
        assert spy is None or not [event for event in spy.idle() if isinstance(event, Arrived)]


@needs_mosquitto
def test_mosquitto_tells_a_v5_client_what_it_refused(connect: Connect) -> None:
    credentials = Credentials.generate("farm", ["dev-1"])
    login = credentials.devices[0]
    with MosquittoBroker(port=0, credentials=credentials) as broker:
        device = connect(broker.url, login.username, username=login.username, password=login.password)
        message_id = device.transport.publish("fedzo/v1/farm/head", b"forged")
        assert device.wait(Rejected, message_id=message_id).reason == "Not authorized"


@needs_mosquitto
def test_mosquitto_keeps_a_session_from_another_device(connect: Connect) -> None:
    credentials = Credentials.generate("farm", ["dev-1", "dev-2"])
    one, two = credentials.devices
    with MosquittoBroker(port=0, credentials=credentials) as broker:
        first = connect(broker.url, "dev-1", username=one.username, password=one.password)
        connect(broker.url, "dev-1", username=two.username, password=two.password)  # with the id of the first
        assert not [event for event in first.idle() if isinstance(event, Disconnected)]


@pytest.mark.parametrize("kind", OWN)
def test_a_will_needs_the_right_to_publish_it(kind: type[MosquittoBroker | EmbeddedBroker], connect: Connect) -> None:
    credentials = Credentials.generate("farm", ["dev-1"])
    server_login, login = credentials.server, credentials.devices[0]
    with kind(port=0, credentials=credentials) as broker:
        host, _, port = broker.url.removeprefix("mqtt://").rpartition(":")
        relay = Proxy((host, int(port)))
        server = connect(
            broker.url, server_login.username, username=server_login.username, password=server_login.password,
            subscriptions=["fedzo/v1/farm/head"],
        )  # fmt: skip
        try:
            connect(
                relay.url, "dev-1", username=login.username, password=login.password,
                will=Will("fedzo/v1/farm/head", b"forged"),
            )  # fmt: skip
        except BrokerError:
            pass  # amqtt: refused at once
        else:
            relay.cut()
            assert not [event for event in server.idle() if isinstance(event, Arrived)]
        finally:
            relay.close()


@needs_mosquitto
def test_mosquitto_takes_new_devices_without_dropping_the_others(connect: Connect) -> None:
    credentials = Credentials.generate("farm", ["dev-1"])
    one = credentials.devices[0]
    with MosquittoBroker(port=0, credentials=credentials) as broker:
        first = connect(broker.url, "dev-1", username=one.username, password=one.password)
        more = credentials.with_devices(["dev-1", "dev-2"])
        assert more.devices[0] == one
        broker.update_credentials(more)
        two = more.devices[1]

        def joined() -> bool:
            try:
                connect(broker.url, "dev-2", username=two.username, password=two.password)
            except BrokerError:
                return False
            return True

        wait_until(joined)
        assert not [event for event in first.idle() if isinstance(event, Disconnected)]


@pytest.mark.parametrize("spec", ["auto", "mosquitto", "embedded"])
@pytest.mark.parametrize("given", [{"login": Login("x", "y")}, {"tls": TlsConfig(Path("ca.pem"))}])
def test_a_login_for_a_broker_of_ones_own_is_refused(spec: str, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="starts itself") as caught:
        open_broker(spec, port=0, **given)
    assert "--credentials" in caught.value.hint
    assert "--broker URL" in caught.value.hint


def test_another_authority_for_the_broker_keeps_the_servers_certificate() -> None:
    files = ServerTls(Path("server.pem"), Path("server.key"), Path("ca.pem"))
    broker = open_broker("mqtts://x", server_tls=files, tls=TlsConfig(Path("other.pem")))
    assert broker.tls == TlsConfig(Path("other.pem"), Path("server.pem"), Path("server.key"))
    assert open_broker("mqtts://x", server_tls=files).tls == files.own_client()
    assert open_broker("mqtts://x", tls=TlsConfig(Path("other.pem"))).tls == TlsConfig(Path("other.pem"))


# ---------------------------------------------------------------------- starting, dying


@pytest.mark.parametrize("kind", OWN)
def test_a_port_in_use_is_named(kind: type[MosquittoBroker | EmbeddedBroker]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BrokerError, match=f"port {port} on 127.0.0.1 is in use") as caught:
            kind(port=port).start()
    assert "--broker" in caught.value.hint
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("kind", OWN)
def test_an_address_of_another_machine_is_refused(kind: type[MosquittoBroker | EmbeddedBroker]) -> None:
    with pytest.raises(BrokerError, match=r"^192\.0\.2\.1 is no address of this machine$") as caught:
        kind("192.0.2.1", 0).start()
    assert "0.0.0.0" in caught.value.hint


@pytest.mark.parametrize("kind", OWN)
def test_a_crashed_broker_comes_back(kind: type[MosquittoBroker | EmbeddedBroker], connect: Connect) -> None:
    with kind(port=0) as broker:
        client = connect(broker.url, "client", subscriptions=["f/x"])
        first = broker.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        client.wait(Disconnected)
        wait_until(lambda: not broker.alive() or broker.pid != first)
        wait_until(broker.alive)
        assert broker.failure() is None
        assert client.wait(Connected).generation == 2
        wait_until(lambda: client.transport.connected)
        client.transport.publish("f/x", b"back")
        assert client.wait(Arrived).payload == b"back"


@pytest.mark.parametrize("kind", OWN)
def test_a_broker_that_keeps_crashing_is_given_up(
    kind: type[MosquittoBroker | EmbeddedBroker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedzo.broker_server.brokers.child._MOST_CRASHES", 2)
    with kind(port=0) as broker:
        for _ in range(2):
            assert broker.failure() is None
            wait_until(lambda: broker.pid is not None)
            killed = broker.pid
            assert killed is not None
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda: broker.pid != killed)  # noqa: B023
        wait_until(lambda: broker.failure() is not None)
        assert "signal SIGKILL" in (broker.failure() or "")
        assert "crashed 2 times" in (broker.failure() or "")
        assert not broker.alive()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("#!/bin/sh\necho 'Error: out of cheese'\nexit 3\n", r"exit code 3; its last words: Error: out of cheese$"),
        ("#!/bin/sh\nkill -SEGV $$\n", r"signal SIGSEGV$"),
        ("#!/no/such/interpreter\n", r"cannot run .*: No such file or directory$"),
    ],
)
def test_a_program_that_ends_at_once_is_reported_with_its_last_words(script: str, words: str) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # not tmp_path, whose parents are private
        Path(folder).chmod(0o755)
        program = Path(folder) / "mosquitto"
        program.write_text(script)
        program.chmod(0o755)
        broker = MosquittoBroker(port=0, program=str(program))
        with pytest.raises(BrokerError, match=words):
            broker.start()
    assert not broker.alive()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
@pytest.mark.parametrize("spec", [pytest.param("mosquitto", marks=needs_mosquitto), "embedded"])
def test_the_broker_dies_with_its_parent(spec: str) -> None:
    script = (
        "import sys, time\n"
        "from fedzo.broker_server.brokers import open_broker\n"
        f"broker = open_broker({spec!r}, port=0)\n"
        "broker.start()\n"
        "print(broker.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        parent.kill()
        parent.wait()
    wait_until(lambda: not _runs(child))


def _runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process are read from /proc")
@pytest.mark.parametrize("spec", [pytest.param("mosquitto", marks=needs_mosquitto), "embedded"])
def test_a_broker_may_open_as_many_files_as_the_system_allows(spec: str) -> None:
    """A device is a file, and shells allow 1024."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    try:
        with open_broker(spec, "127.0.0.1", 0) as broker:
            text = Path(f"/proc/{broker.pid}/limits").read_text(encoding="ascii")  # type: ignore[attr-defined]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    (line,) = [line for line in text.splitlines() if line.startswith("Max open files")]
    soft, hard = line.split()[3:5]
    assert soft == hard


@needs_mosquitto
def test_mosquitto_files_are_private_and_removed(tmp_path: Path) -> None:
    credentials = Credentials.generate("farm", ["dev-1"])
    place = tmp_path / "runs"
    broker = MosquittoBroker(port=0, credentials=credentials, folder=place)
    broker.start()
    command = Path(f"/proc/{broker.pid}/cmdline").read_text().split("\0")
    folder = Path(command[2]).parent
    try:
        assert folder.parent == (place if os.geteuid() else Path("/run"))
        assert folder.stat().st_mode & 0o777 == (0o700 if os.geteuid() else 0o710)
        assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())
        assert credentials.devices[0].password not in (folder / "passwords").read_text()
    finally:
        broker.stop()
    assert not folder.exists()
    assert not place.exists(), "it was made for the files"


def test_private_files_lie_where_nothing_is_removed_by_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mosquitto_module.place_of_files("", tmp_path / "a" / "..") == tmp_path
    assert mosquitto_module.place_of_files("", None) is None
    monkeypatch.setattr(mosquitto_module, "_RUNTIME", tmp_path)
    assert mosquitto_module.place_of_files("nobody", tmp_path / "private") == tmp_path
    monkeypatch.setattr(mosquitto_module, "_RUNTIME", tmp_path / "missing")
    assert mosquitto_module.place_of_files("nobody", tmp_path) is None
    # Whoever cleans temporary folders asks for this lock first.
    made = PrivateFolder("fedzo-", parent=tmp_path / "new")
    cleaner = os.open(made.path, os.O_RDONLY | os.O_DIRECTORY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(cleaner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    made.remove()
    fcntl.flock(cleaner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(cleaner)
    assert list(tmp_path.iterdir()) == []


@needs_mosquitto
def test_a_served_run_keeps_them_beside_the_runs(tmp_path: Path) -> None:
    served = ServeAccess(ServeSettings(broker="mosquitto"), tmp_path).broker
    assert isinstance(served, MosquittoBroker)
    assert served._parent == tmp_path


def test_the_folder_of_a_killed_owner_is_swept_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    script = (
        "import os, sys, tempfile\n"
        "from fedzo.broker_server.brokers.private_files import PrivateFolder\n"
        "tempfile.tempdir = sys.argv[1]\n"
        "folder = PrivateFolder('fedzo-')\n"
        "(folder.path / 'key.pem').write_text('secret')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    own = PrivateFolder("fedzo-")
    (tmp_path / "fedzo-foreign").mkdir()
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3
    other = PrivateFolder("fedzo-")
    assert set(tmp_path.iterdir()) == {own.path, other.path, tmp_path / "fedzo-foreign"}
    own.remove()
    own.remove()
    other.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["fedzo-foreign"]


def test_the_embedded_broker_hides_passwords_from_the_process_list() -> None:
    credentials = Credentials.generate("farm", [])
    with EmbeddedBroker(port=0, credentials=credentials) as broker:
        assert credentials.server.password not in Path(f"/proc/{broker.pid}/cmdline").read_text()


@pytest.mark.parametrize(
    "first_bytes",
    [b"GET / HTTP/1.1\r\n\r\n", b"\x10\xff\xff\xff\xff\xff", b"\x10\x0c\x00\xffMQTT\x04\x02\x00\x00\x00\x00", b"\x10"],
)
def test_the_embedded_broker_outlives_nonsense(first_bytes: bytes, connect: Connect) -> None:
    with EmbeddedBroker(port=0) as broker:
        with socket.create_connection(("127.0.0.1", broker.port), timeout=5) as link:
            link.sendall(first_bytes)
            link.shutdown(socket.SHUT_WR)
            assert link.recv(100) in (b"", b"\x20\x02\x00\x01")
        connect(broker.url, "client")


# ---------------------------------------------------------------------- choosing


def test_auto_prefers_mosquitto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_module, "find_mosquitto", lambda: None)
    assert isinstance(open_broker("auto"), EmbeddedBroker)
    monkeypatch.undo()
    if find_mosquitto() is not None:
        assert isinstance(open_broker("auto"), MosquittoBroker)


@pytest.mark.parametrize(
    ("spec", "host", "kind", "words"),
    [
        ("rabbit", "127.0.0.1", ConfigError, "unknown broker 'rabbit'"),
        ("embedded", "0.0.0.0", BrokerError, "loopback only"),
        ("auto", "192.168.1.5", BrokerError, "mosquitto is not installed, and"),
        ("mosquitto", "127.0.0.1", BrokerError, "mosquitto is not installed"),
        ("http://broker", "127.0.0.1", ConfigError, "no scheme"),
    ],
)
def test_what_cannot_be_had_is_refused_with_a_way_out(
    spec: str, host: str, kind: type[FedzoError], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose_module, "find_mosquitto", lambda: None)
    monkeypatch.setattr("fedzo.broker_server.brokers.mosquitto.find_mosquitto", lambda: None)
    with pytest.raises(kind, match=words) as caught:
        open_broker(spec, host)
    assert caught.value.hint


def test_a_missing_amqtt_leads_to_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BrokerError, match="amqtt") as caught:
        open_broker("embedded")
    assert "pip install 'fedzo[server]'" in caught.value.hint


@needs_mosquitto
def test_probing_an_external_broker_leaves_the_servers_queue_alone(connect: Connect) -> None:
    credentials = Credentials.generate("farm", ["dev-1"])
    server_login, login = credentials.server, credentials.devices[0]
    with MosquittoBroker(port=0, credentials=credentials) as real:

        def server() -> Client:
            return connect(
                real.url, server_login.username, username=server_login.username, password=server_login.password,
                subscriptions=["fedzo/v1/farm/d/+/report"], clean_start=False, session_expiry_s=86_400, manual_ack=True,
            )  # fmt: skip

        server().transport.close()
        device = connect(real.url, "dev-1", username=login.username, password=login.password)
        device.wait(Delivered, message_id=device.transport.publish("fedzo/v1/farm/d/dev-1/report", b"while away"))
        ExternalBroker(real.url, login=server_login).start()
        assert server().wait(Arrived).payload == b"while away"


def test_an_external_broker_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedzo.broker_server.brokers.external._TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    broker = ExternalBroker(f"mqtt://user:secret@127.0.0.1:{port}")
    assert "secret" not in broker.url + broker.description
    assert not broker.alive()
    with pytest.raises(BrokerError, match=f"127.0.0.1:{port} within 1 s: nobody listens there"):
        broker.start()

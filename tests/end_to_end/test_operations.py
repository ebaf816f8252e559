"""Real processes as an operator sees them: signals, metrics, health, logs, status."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from fedzo.broker_server.brokers.mosquitto import MosquittoBroker, find_mosquitto
from fedzo.edge_runtime.connection.transport import Arrived, MqttTransport, TransportEvent
from fedzo.protocol.wire.documents import ServerPresence, parse
from tests.end_to_end.conftest import Finished, MakeFleet
from tests.end_to_end.fleet import Fleet, Process, agree, free_port, wait_for

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

STOP_S = 30.0  # on a loaded machine; a quiet one takes a second


def finish(fleet: Fleet, server: Process, expected: Finished) -> None:
    """The run ends with the weights of the undisturbed one; no report was lost or counted twice."""
    answer = server.answer()
    assert agree(answer, [device.answer() for device in fleet.boards]) == expected.digest
    assert (answer["reports"], answer["refused"]) == (expected.server["reports"], 0)


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a program has a handler for a signal (proc(5), ``SigCgt``)."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    (mask,) = [line.split()[1] for line in lines if line.startswith("SigCgt:")]
    return bool(int(mask, 16) >> (number - 1) & 1)


class Watch:
    """What the retained state of the server says, as a device sees it."""

    def __init__(self, url: str) -> None:
        self.online: list[bool] = []
        self._transport = MqttTransport(url, "watch", on_event=self._hear, subscriptions=["fedzo/v1/default/srv"])
        self._transport.connect(20.0)

    def _hear(self, event: TransportEvent) -> None:
        if isinstance(event, Arrived):
            self.online.append(parse(ServerPresence, event.payload).online)

    def close(self) -> None:
        self._transport.close()


@pytest.mark.parametrize(
    "moment", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)]
)
def test_sigterm_keeps_what_has_arrived_and_a_resumed_run_ends_the_same(
    moment: int, undisturbed: Finished, fleets: MakeFleet, mosquitto_url: str
) -> None:
    """The server says that it is away, and leaves; its will is not what says so."""
    fleet = fleets(url=mosquitto_url)
    watch = Watch(mosquitto_url)
    fleet.devices(rig="hasty")
    server = fleet.serve()
    fleet.await_entries("update", moment)
    announced = len(fleet.entries("announce"))
    server.signal(signal.SIGTERM)
    assert server.wait(STOP_S) == 0, server.stderr
    assert json.loads(server.stdout)["phase"] != "done"
    assert json.loads(server.stdout)["digests_agree"] is None
    assert "all devices agree\tnot known before the end" in server.stderr
    assert len(fleet.entries("announce")) <= announced + 2
    wait_for(lambda: watch.online and not watch.online[-1], "the server to say that it is away")
    assert not (fleet.path / "live.json").exists()
    time.sleep(0.2)
    assert watch.online.count(False) == 1, "the goodbye alone: a will would be a second message"
    assert all(device.running for device in fleet.boards)
    finish(fleet, fleet.resume(), undisturbed)
    watch.close()


@pytest.mark.parametrize(
    ("place", "name", "code"),
    [
        ("data", "SIGTERM", 0),
        pytest.param("data", "SIGINT", 130, marks=pytest.mark.slow),
        pytest.param("broker", "SIGTERM", 0, marks=pytest.mark.slow),
        ("broker", "SIGINT", 130),
        ("folder", "SIGTERM", 0),
        pytest.param("folder", "SIGINT", 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_before_there_is_a_server(place: str, name: str, code: int, fleets: MakeFleet) -> None:
    """Its own broker and what that needs are gone; a run is not there, or there to go on with."""
    fleet = fleets()
    server = fleet.serve(rig=f"stop:{place}:{name}")
    assert server.wait(STOP_S) == code, server.stderr
    assert "Traceback" not in server.stderr
    (line,) = server.stdout.splitlines()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(fleet.url.rpartition(":")[2])), timeout=5).close()
    runs = fleet.folder / "runs"
    made = sorted(path.name for path in runs.iterdir()) if runs.exists() else []
    if place != "folder":
        assert made == []
        assert code or json.loads(line) == {"run": "small", "phase": "not served"}
        return
    assert made == ["run.key", "small"]
    assert "go on with: fedzo serve --resume" in server.stderr
    again = fleet.resume()
    again.until("devices join with")


def test_a_server_without_its_broker_still_stops(undisturbed: Finished, fleets: MakeFleet) -> None:
    broker = MosquittoBroker(port=free_port())
    broker.start()
    try:
        fleet = fleets(url=broker.url)
        fleet.devices(rig="hasty")
        server = fleet.serve()
        fleet.await_entries("update", 2)
        broker.stop()
        time.sleep(0.3)
        server.signal(signal.SIGTERM)
        assert server.wait(STOP_S) == 0, server.stderr
        assert f"fedzo serve --resume {fleet.path}" in server.stderr
        broker.start()
        finish(fleet, fleet.resume(), undisturbed)
    finally:
        broker.stop()


def test_a_second_signal_ends_the_server_at_once(undisturbed: Finished, fleets: MakeFleet) -> None:
    """Even while a broker that hangs keeps it from saying goodbye; nothing that was acknowledged is lost."""
    broker = MosquittoBroker(port=free_port())
    broker.start()
    try:
        fleet = fleets(url=broker.url)
        fleet.devices(rig="hasty")
        server = fleet.serve()
        fleet.await_entries("update", 2)
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGSTOP)
        server.signal(signal.SIGTERM)
        wait_for(lambda: not catches(server.pid, signal.SIGTERM), "the server to take the first signal")
        server.signal(signal.SIGTERM)
        assert server.wait(STOP_S) == -signal.SIGTERM, "it left by itself"
        os.kill(broker.pid, signal.SIGCONT)
        finish(fleet, fleet.resume(), undisturbed)
    finally:
        broker.stop()


def test_a_device_that_is_told_to_stop_comes_back_to_the_same_run(
    undisturbed: Finished, fleets: MakeFleet, mosquitto_url: str
) -> None:
    fleet = fleets(url=mosquitto_url)
    first, *others = fleet.devices(rig="hasty")
    server = fleet.serve()
    fleet.await_entries("update", 2)
    first.signal(signal.SIGTERM)
    assert first.answer(STOP_S)["status"] == "left"
    again = fleet.device(0, rig="hasty")
    fleet.boards = [again, *others]
    finish(fleet, server, undisturbed)


def test_what_an_operator_sees(fleets: MakeFleet, mosquitto_url: str) -> None:
    """Metrics, health, status and log of one run agree."""
    fleet = fleets(url=mosquitto_url)
    url = f"http://127.0.0.1:{free_port()}"
    server = fleet.serve("--metrics", url.removeprefix("http://"), "--log-format", "json", "--rounds", 40)
    wait_for(lambda: "announced" in server.stderr or "connected" in server.stderr, "the server to connect")
    status, text = get(f"{url}/healthz")
    assert (status, json.loads(text)["ok"]) == (200, True)
    wait_for(lambda: get(f"{url}/readyz")[0] == 200, "the server to be ready")
    fleet.devices("--log-format", "json", "--log-file", fleet.folder / "device.log")
    fleet.await_entries("update", 3)
    seen = fleet.fedzo("status", fleet.path)
    assert seen["server_pid"] == server.pid
    assert (seen["devices"], seen["quorum"], seen["refused"]) == (3, 3, 0)
    assert seen["live"]["is_connected"] is True
    assert seen["live"]["devices"] == {"ready": 3}
    assert seen["live"]["bytes_in"] > 0
    assert seen["live"]["resident_mib"] > 0
    metrics = get(f"{url}/metrics")[1]
    assert 'fedzo_devices{state="ready"} 3.0' in metrics
    assert 'fedzo_reports_total{verdict="refused"} 0.0' in metrics
    assert f'fedzo_run_info{{run="{fleet.path.name}"}} 1.0' in metrics
    answer = server.answer()
    assert agree(answer, [device.answer() for device in fleet.boards])
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url}/healthz", timeout=5)
    over = fleet.fedzo("status", fleet.path)
    assert (over["phase"], over["updates"], over["reports"]) == ("done", answer["rounds"], answer["reports"])
    assert over["accuracy"] == answer["accuracy"]
    assert (over["server_pid"], over["live"], over["states"]) == (None, None, {"done": 3})
    events = [json.loads(line) for line in server.stderr.splitlines()]
    names = [event["event"] for event in events]
    assert names.count("enrolled") == 3
    assert names.count("closed") == names.count("announced") - 1, "all but the end"
    assert all(event["run"] == fleet.path.name for event in events if event["event"] == "announced")
    reports = [json.loads(line) for line in (fleet.folder / "device.log").read_text().splitlines()]
    reports = [event for event in reports if event["event"] == "report"]
    assert {event["device"] for event in reports} == {"board-0", "board-1", "board-2"}
    assert len(reports) == answer["reports"]


def test_watching_a_run_to_its_end(fleets: MakeFleet, mosquitto_url: str) -> None:
    fleet = fleets(url=mosquitto_url)
    server = fleet.serve()
    server.until("devices join with")
    watcher = fleet.start(
        "watch", [sys.executable, "-m", "fedzo.cli", "status", fleet.path, "--watch", "--interval", 0.1]
    )
    wait_for(lambda: "enrol: round 0" in watcher.stdout, "the watcher to begin", logs=lambda: watcher.stderr)
    fleet.devices()
    server.answer()
    assert watcher.wait() == 0, watcher.stderr
    assert watcher.stdout.splitlines()[-1].startswith("done: round ")
    assert "update 6/6" in watcher.stdout


def test_a_service_that_is_restarted_goes_on_with_its_run(
    undisturbed: Finished, fleets: MakeFleet, mosquitto_url: str, tmp_path: Path
) -> None:
    """The command line of a unit, twice the same; the service manager hears that it lives, and that it ends."""
    fleet = fleets(url=mosquitto_url)
    fleet.devices(rig="hasty")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(STOP_S)
        manager_says = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "4000000"}
        server = fleet.serve("--continue", **manager_says)
        fleet.await_entries("update", 3)
        server.signal(signal.SIGTERM)
        assert server.wait(STOP_S) == 0, server.stderr
        heard = []
        while "STOPPING=1" not in heard:
            heard.append(manager.recv(100).decode())
        assert heard[0] == "READY=1"
        assert "WATCHDOG=1" in heard
    fleet.serve("--continue", "--k", 17).until("began with training.k 16, not 17")
    finish(fleet, fleet.serve("--continue"), undisturbed)
    assert fleet.serve("--continue").answer()["phase"] == "done", "a run that is over is over at once"

"""Signs of life to systemd: what arrives on its socket, and that a hung loop sends none."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedzo.edge_runtime.agent import Agent, Connection
from fedzo.edge_runtime.installation.service import ServiceManager
from fedzo.edge_runtime.storage.state import DeviceState
from fedzo.edge_runtime.worker import Limits
from fedzo.protocol.wire.documents import Hello


class Listener:
    """The socket of a service manager."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)

    def received(self, seconds: float = 0.0) -> list[str]:
        """What has arrived, and what arrives in the next seconds."""
        out, end = [], time.monotonic() + seconds
        while True:
            self.socket.settimeout(max(0.0, end - time.monotonic()))
            try:
                out.append(self.socket.recv(4096).decode())
            except (TimeoutError, BlockingIOError):
                return out


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    listening = Listener(str(tmp_path / "notify"))
    yield listening
    listening.socket.close()


def test_states_arrive(listener: Listener, tmp_path: Path) -> None:
    service = ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    assert service.interval_s is None
    service.feed()  # no watchdog
    service.ready()
    service.stopping()
    assert listener.received() == ["READY=1", "STOPPING=1"]


def test_an_abstract_socket() -> None:
    name = f"fedzo-test-{os.getpid()}"
    listening = Listener("\0" + name)
    ServiceManager({"NOTIFY_SOCKET": "@" + name}).ready()
    assert listening.received() == ["READY=1"]
    listening.socket.close()


def test_the_watchdog_is_fed_in_time_and_not_more_often(listener: Listener, tmp_path: Path) -> None:
    now = [100.0]
    environ = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "8000000", "WATCHDOG_PID": str(os.getpid())}
    service = ServiceManager(environ, clock=lambda: now[0])
    assert service.interval_s == 2.0
    for _ in range(80):
        service.feed()
        now[0] += 0.1
    assert 4 <= len(listener.received()) <= 5


@pytest.mark.parametrize(
    "changes",
    [{"NOTIFY_SOCKET": ""}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_PID": "1"}],
)
def test_no_watchdog_for_this_process(changes: dict[str, str]) -> None:
    environ = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "8000000", "WATCHDOG_PID": str(os.getpid())}
    assert ServiceManager(environ).interval_s == 2.0
    assert ServiceManager(environ | changes).interval_s is None


def test_a_manager_that_is_gone_is_no_error(tmp_path: Path) -> None:
    service = ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone"), "WATCHDOG_USEC": "8000000"})
    service.ready()
    service.feed()


# --- the device -----------------------------------------------------------------------------------------------------


def test_a_device_tells_from_start_to_end(listener: Listener, tmp_path: Path) -> None:
    """Without a broker: it is ready, lives, and says when it stops."""
    np.savez(tmp_path / "data.npz", x_train=np.zeros((8, 4, 4), np.uint8), y_train=np.zeros(8, np.int64))
    command = [sys.executable, "-m", "fedzo.edge_runtime", "join", "mqtt://127.0.0.1:1", "--id", "dev-a"]
    command += ["--data", str(tmp_path / "data.npz"), "--state", str(tmp_path / "state")]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FEDZO_")}
    environ |= {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
    with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as device:
        listener.socket.settimeout(30)
        assert listener.socket.recv(64) == b"READY=1"
        started = time.monotonic()
        alive = listener.received(1.0)
        seconds = time.monotonic() - started
        device.send_signal(signal.SIGTERM)
        assert device.wait(60) == 0
    assert set(alive) == {"WATCHDOG=1"}
    assert 2 <= len(alive) <= 2 + 10 * seconds  # one every 0.1 s, on a machine with time
    assert listener.received()[-1] == "STOPPING=1"


@pytest.mark.parametrize("hangs", [False, True])
def test_a_loop_that_hangs_starves_the_watchdog(hangs: bool, listener: Listener, tmp_path: Path) -> None:
    found, free = threading.Event(), threading.Event()
    state = DeviceState(tmp_path / "state", federation="default", device="dev-a")
    hello = Hello(state.session, "", 100.0, 8, 0, "", "x86_64")
    environ = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}

    def say(line: str) -> None:
        """Called by the loop when there is no broker."""
        found.set()
        if hangs:
            free.wait(60)

    agent = Agent(
        state, hello, lambda *_: pytest.fail("no run"), Connection("mqtt://127.0.0.1:1"), Limits(100.0),
        service=ServiceManager(environ), say=say,
    )  # fmt: skip
    loop = threading.Thread(target=agent.run, daemon=True)
    loop.start()
    assert found.wait(60)
    time.sleep(0.2)
    listener.received()
    alive = listener.received(1.0)
    free.set()
    agent.stop()
    loop.join(60)
    assert not loop.is_alive()
    state.close()
    assert (len(alive) == 0) == hangs, alive

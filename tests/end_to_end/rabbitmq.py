"""A cluster of RabbitMQ nodes with its MQTT plugin, all on this machine, with files in one folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from tests.end_to_end.fleet import free_port, wait_for

__all__ = ["RabbitCluster", "find_rabbitmq"]

START_S = 180.0


def find_rabbitmq() -> str | None:
    """The script that runs a node; Debian's package wraps it for its own user."""
    return shutil.which("rabbitmq-server", path="/usr/lib/rabbitmq/bin")


class RabbitCluster:
    """Nodes that find each other by name; each can be killed and started again.

    Args:
        folder: Of its own.
        nodes: How many.
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.ports = [free_port() for _ in range(nodes)]
        self._epmd_port = free_port()
        self._names = [f"fedzo{number}@localhost" for number in range(nodes)]
        self._ports = [(free_port(), free_port()) for _ in range(nodes)]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def url(self, number: int) -> str:
        return f"mqtt://127.0.0.1:{self.ports[number]}"

    def start(self, *numbers: int) -> None:
        """Start nodes, all by default, and wait until they listen for MQTT."""
        numbers = numbers or tuple(range(len(self.ports)))
        for number in numbers:
            self._launch(number)
        for number in numbers:
            wait_for(lambda number=number: self._listens(number), f"node {number}", START_S, self.logs)  # type: ignore[misc]

    def kill(self, number: int) -> None:
        """kill -9 of the node and all of its children."""
        process = self._processes.pop(number)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        for number in list(self._processes):
            self.kill(number)
        epmd = shutil.which("epmd")
        if epmd is not None:  # Erlang's name server is a daemon that the first node has started, on a port of our own.
            command = [epmd, "-port", str(self._epmd_port), "-kill"]
            for _ in range(20):  # It stays while it believes that a node lives.
                if "Killed" in subprocess.run(command, capture_output=True, text=True, check=False).stdout:
                    break
                time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.out"))

    def _launch(self, number: int) -> None:
        script = find_rabbitmq()
        assert script is not None, "RabbitMQ is not installed"
        node = self.folder / f"node{number}"
        node.mkdir(exist_ok=True)
        amqp, distribution = self._ports[number]
        lines = [
            f"mqtt.listeners.tcp.1 = 127.0.0.1:{self.ports[number]}",
            f"listeners.tcp.1 = 127.0.0.1:{amqp}",
            "mqtt.allow_anonymous = true",
            "mqtt.prefetch = 500",
            "loopback_users = none",
            "log.file.level = warning",
            "cluster_formation.peer_discovery_backend = classic_config",
            *(f"cluster_formation.classic_config.nodes.{n} = {name}" for n, name in enumerate(self._names, 1)),
        ]
        (node / "rabbitmq.conf").write_text("\n".join(lines) + "\n")
        (node / "enabled_plugins").write_text("[rabbitmq_mqtt].\n")
        settings = {
            "HOME": self.folder,
            "RABBITMQ_NODENAME": self._names[number],
            "RABBITMQ_MNESIA_BASE": node / "mnesia",
            "RABBITMQ_LOG_BASE": node / "log",
            "RABBITMQ_CONFIG_FILE": node / "rabbitmq",
            "RABBITMQ_ENABLED_PLUGINS_FILE": node / "enabled_plugins",
            "RABBITMQ_PID_FILE": node / "pid",
            "RABBITMQ_CONF_ENV_FILE": node / "none",
            "RABBITMQ_DIST_PORT": distribution,
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none -setcookie fedzo",
            "ERL_EPMD_PORT": self._epmd_port,
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }
        environment = os.environ | {name: str(value) for name, value in settings.items()}
        with (self.folder / f"node{number}.out").open("ab") as out:
            self._processes[number] = subprocess.Popen(
                [script], env=environment, stdout=out, stderr=out, cwd=self.folder, start_new_session=True
            )

    def _listens(self, number: int) -> bool:
        assert self._processes[number].poll() is None, self.logs()
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.ports[number]), timeout=1.0):
            return True
        return False

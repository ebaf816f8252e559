"""Hosts of a test network: Linux network namespaces on a bridge, whose cables can be pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

__all__ = ["Network", "lacking"]


def lacking() -> str:
    """Why no namespaces can be made here; empty if they can."""
    if shutil.which("ip") is None:
        return "the program ip (iproute2) is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"fedzo-test-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    pair = subprocess.run(
        ["ip", "-n", name, "link", "add", "one", "type", "veth", "peer", "name", "two"], capture_output=True, text=True
    )
    subprocess.run(["ip", "netns", "del", name], check=True)
    return f"no virtual cables here: {pair.stderr.strip()}" if pair.returncode else ""


class Network:
    """A hub at 10.231.7.1 and hosts from 10.231.7.2 on, apart from the machine's own network.

    Args:
        hosts: Names.
    """

    HUB = "10.231.7.1"

    def __init__(self, hosts: Sequence[str]) -> None:
        self._prefix = f"fedzo-{os.getpid()}-"
        self._made: list[str] = []
        self._ports = {name: f"port{number}" for number, name in enumerate(hosts)}
        self._add("hub")
        self._in("hub", "link", "add", "switch", "type", "bridge")
        self._in("hub", "addr", "add", f"{self.HUB}/24", "dev", "switch")
        self._in("hub", "link", "set", "switch", "up")
        for number, (name, port) in enumerate(self._ports.items(), 2):
            self._add(name)
            self._in("hub", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", self._prefix + name)
            self._in("hub", "link", "set", port, "master", "switch", "up")
            self._in(name, "addr", "add", f"10.231.7.{number}/24", "dev", "eth0")
            self._in(name, "link", "set", "eth0", "up")

    def at(self, host: str) -> tuple[str, ...]:
        """What a command line begins with to run there."""
        return ("ip", "netns", "exec", self._prefix + host)

    def pull(self, host: str) -> None:
        """Packets from and to this host vanish; nobody is told."""
        self._in("hub", "link", "set", self._ports[host], "nomaster")

    def plug(self, host: str) -> None:
        """They arrive again."""
        self._in("hub", "link", "set", self._ports[host], "master", "switch")

    def close(self) -> None:
        """Remove everything."""
        while self._made:
            subprocess.run(["ip", "netns", "del", self._made.pop()], check=False)

    def _add(self, name: str) -> None:
        subprocess.run(["ip", "netns", "add", self._prefix + name], check=True)
        self._made.append(self._prefix + name)
        self._in(name, "link", "set", "lo", "up")

    def _in(self, host: str, *arguments: str) -> None:
        subprocess.run(["ip", "-n", self._prefix + host, *arguments], check=True, capture_output=True)

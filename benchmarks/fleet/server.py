"""The server's process as the operator starts it, and what the kernel says of it."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fedzo.protocol.errors import FedzoError

__all__ = ["ServerProcess", "free_port", "raise_file_limit"]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def raise_file_limit(wanted: int) -> None:
    """Let this process, and those that it starts, open so many files.

    Raises:
        FedzoError: The system allows fewer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise FedzoError(f"{wanted} open files are needed, the system allows {hard}", hint="ulimit -Hn")
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class ServerProcess:
    """``fedzo serve``.

    Args:
        arguments: Of ``fedzo serve``.
        log: Where it writes what it says.
        program: What runs it.
    """

    def __init__(self, arguments: Sequence[object], log: Path, program: Sequence[str] = ("-m", "fedzo.cli")) -> None:
        command = [sys.executable, *program, "serve", *(str(part) for part in arguments), "--json"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FEDZO_")}
        self._log = log
        with log.open("ab") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                                             env=environment, start_new_session=True)  # fmt: skip

    @property
    def cpu_s(self) -> float:
        """Processor time of all threads so far, by the kernel's clock of the process (clock_getcpuclockid(3))."""
        return time.clock_gettime((~self._process.pid << 3) | 2)

    @property
    def peak_mib(self) -> float:
        """``VmHWM``."""
        text = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        line = next(line for line in text.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    def check(self) -> None:
        """Raise what it ended with, if it has ended.

        Raises:
            FedzoError: It has.
        """
        if (code := self._process.poll()) is not None:
            raise FedzoError(f"the server ended with {code}: {self._log.read_text(encoding='utf-8')[-2000:]}")

    def await_port(self, port: int, timeout_s: float = 60.0, *, host: str = "127.0.0.1") -> None:
        """Wait until its broker accepts connections.

        Raises:
            FedzoError: It does not.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.check()
            with suppress(OSError), socket.create_connection((host, port), 1.0):
                return
            time.sleep(0.02)
        raise FedzoError(f"nobody listens on port {port} after {timeout_s:g} s")

    def kill(self) -> None:
        """kill -9, without its broker."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Ask it to end, then kill it with all that it started."""
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(20.0)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

"""A small federation of real processes on one machine: `fedzo serve` and several `fedzo-device join`.

Everything is small (LeNet-5 on 16x16 images, four classes) and every process gets a log in the fleet's folder, which a
failing test prints. A run is deterministic as long as the quorum is all devices, so tests compare weights digests.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedzo.broker_server.journal import Entry, SqliteJournal
from fedzo.protocol.errors import FedzoError

SIDE = 16
CLASSES = 4
SAMPLES = 40
RUN = "small"
CLI = ("-m", "fedzo.cli")
DEVICE = ("-m", "fedzo.edge_runtime")
RIGGED = str(Path(__file__).with_name("rigged.py"))
TIMEOUT_S = 90.0
POLL_S = 0.01


def environment(**extra: str) -> dict[str, str]:
    """One thread each: the machine that runs the tests has few cores and many processes."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FEDZO_")}
    return {**inherited, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **extra}


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def images(seed: int, n: int = SAMPLES) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images of four noisy patterns, in a mixture that depends on the seed."""
    patterns = np.random.default_rng(99).integers(0, 256, (CLASSES, 1, SIDE, SIDE))
    rng = np.random.default_rng(seed)
    labels = rng.choice(CLASSES, n, p=rng.dirichlet(np.full(CLASSES, 8.0))).astype(np.int64)
    noisy = patterns[labels] + rng.integers(-50, 51, (n, 1, SIDE, SIDE))
    return noisy.clip(0, 255).astype(np.uint8), labels


def write_images(path: Path, seed: int, n: int = SAMPLES) -> Path:
    """The images of a seed as a file for ``--data``."""
    x, y = images(seed, n)
    np.savez(path, x=x, y=y)
    return path


class Process:
    """One program with its output in files."""

    def __init__(self, name: str, command: Sequence[object], folder: Path, **extra: str) -> None:
        self.name = name
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment(**extra),
                cwd=folder,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self._err.read_text()

    @property
    def error(self) -> dict[str, Any]:
        """The JSON object of a failed end."""
        (line,) = self.stdout.splitlines()
        error: dict[str, Any] = json.loads(line)["error"]
        return error

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """kill -9 with all that it started, and wait for it."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """The exit code."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} runs after {timeout_s:g} s:\n{self.stderr}") from None

    def child(self, program: str) -> int:
        """Process id of the one child whose program's name begins so; 0 while there is none."""
        found = [pid for pid, name, parent in _processes() if parent == self.pid and name.startswith(program)]
        return found[0] if found else 0

    def answer(self, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """The one JSON object of a successful end."""
        code = self.wait(timeout_s)
        assert code == 0, f"{self.name} ended with {code}:\n{self.stdout}\n{self.stderr}"
        (line,) = self.stdout.splitlines()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def until(self, text: str, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until the program has printed a text to stderr."""
        wait_for(lambda: text in self.stderr, f"{self.name} to print {text!r}", timeout_s, self._logs)

    def _logs(self) -> str:
        return self.stderr


def wait_for(
    condition: Callable[[], object],
    what: str,
    timeout_s: float = TIMEOUT_S,
    logs: Callable[[], str] = lambda: "",
) -> None:
    """Poll until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}\n{logs()}"
        time.sleep(POLL_S)


def _processes() -> Iterator[tuple[int, str, int]]:
    """Id, name and parent of everything that runs (proc(5), ``/proc/pid/stat``)."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # It ended meanwhile.
            text = path.read_text()
            name, _, rest = text.partition("(")[2].rpartition(")")
            yield int(path.parent.name), name, int(rest.split()[1])


class Fleet:
    """One run: its server, its devices, its folder.

    Args:
        folder: Of its own; run folder, device states and logs go there.
        artifact: Folder of `fedzo export`.
        data: One file a device.
        test_data: The server's.
        url: A broker that runs already; else the server manages one.
        broker: What the server is told when it manages one.
        federation: Its name, also in front of the devices' ids: a broker knows devices by id alone.
    """

    def __init__(
        self,
        folder: Path,
        artifact: Path,
        data: Sequence[Path],
        test_data: Path,
        *,
        url: str = "",
        broker: str = "mosquitto",
        federation: str = "",
    ) -> None:
        self.folder, self.artifact, self.data, self.test_data = folder, artifact, list(data), test_data
        port = free_port()
        self._place: tuple[object, ...] = ("--broker", url) if url else ("--broker", broker, "--port", port)
        self._names, self._federation = (federation or "board"), ("--federation", federation) if federation else ()
        self.url = url or f"mqtt://127.0.0.1:{port}"
        self.path = folder / "runs" / RUN
        self.processes: list[Process] = []
        self.boards: list[Process] = []

    # --- programs ---------------------------------------------------------------------------------------------------

    def start(self, name: str, command: Sequence[object], **extra: str) -> Process:
        """Start a program; the names of its logs are unique."""
        taken = sum(process.name.split(".")[0] == name for process in self.processes)
        process = Process(f"{name}.{taken}" if taken else name, command, self.folder, **extra)
        self.processes.append(process)
        return process

    def device(
        self,
        number: int,
        *options: object,
        program: Sequence[object] = (sys.executable, *DEVICE),
        rig: str = "",
        state: str = "",
        **extra: str,
    ) -> Process:
        """Start (again) the device of a number, ``board-0`` and so on.

        Args:
            number: From 0; its data and its state folder belong to it.
            options: Further options of ``fedzo-device join``.
            program: What runs it.
            rig: See ``rigged.py``.
            state: Name of its state folder, if not its own.
            extra: Environment.
        """
        name = f"{self._names}-{number}"
        if rig:
            program = (sys.executable, RIGGED, rig, "device")
        command = [*program, "join", self.url, "--data", self.data[number], "--id", name, "--retry", 1]
        command += self._federation
        return self.start(
            name, [*command, "--state", self.folder / (state or f"state-{name}"), "--json", *options], **extra
        )

    def devices(self, *options: object, rig: str = "") -> list[Process]:
        """Start all; they are the ``boards``."""
        self.boards = [self.device(number, *options, rig=rig) for number in range(len(self.data))]
        return self.boards

    def serve(self, *options: object, rig: str = "", **extra: str) -> Process:
        """Start the server of a new run; options go last, so they win."""
        n = len(self.data)
        command = ["serve", self.artifact, "--runs", self.folder / "runs", "--run", RUN, "--test-data", self.test_data]
        command += ["--devices", n, "--quorum", n, "--rounds", 6, "--k", 16, "--batch", 8, "--sigma", 0.001]
        command += ["--saliency-samples", 8, "--evaluate-every", 3, "--deadline", 60, "--enrol-deadline", 60]
        command = [*self._server(rig), *command, *self._place, *self._federation, "--json", *options]
        return self.start("server", command, **extra)

    def resume(self, *options: object, rig: str = "") -> Process:
        """Start the server again."""
        return self.start("server", [*self._server(rig), "serve", "--resume", self.path, "--json", *options])

    def _server(self, rig: str) -> tuple[str, ...]:
        return (sys.executable, RIGGED, rig, "server") if rig else (sys.executable, *CLI)

    def fedzo(self, *arguments: object) -> dict[str, Any]:
        """Run a command of `fedzo` to its end."""
        return self.start("fedzo", [sys.executable, *CLI, *arguments, "--json"]).answer()

    # --- the run ----------------------------------------------------------------------------------------------------

    def entries(self, *kinds: str) -> list[Entry]:
        """What the journal holds; empty while there is none."""
        try:
            with SqliteJournal(self.path / "journal.sqlite", read_only=True) as journal:
                return [entry for _, entry in journal.read(set(kinds) or None)]
        except FedzoError:
            return []

    def await_entries(self, kind: str, count: int) -> None:
        """Wait until the journal holds so many entries of a kind."""
        wait_for(lambda: len(self.entries(kind)) >= count, f"{count} entries {kind}", logs=self.logs)

    def logs(self) -> str:
        """What every program printed for people."""
        return "\n".join(f"--- {process.name}\n{process.stderr}" for process in self.processes)

    def close(self) -> None:
        """Kill what still runs."""
        for process in self.processes:
            process.kill()


def agree(server: dict[str, Any], devices: Sequence[dict[str, Any]]) -> str:
    """Check that a run ended well everywhere with the same weights, and return their digest."""
    assert server["phase"] == "done", server
    assert server["digests_agree"] is True, server
    digests = {device["device"]: device["weights_digest"] for device in devices}
    assert set(digests.values()) == {server["weights_digest"]}, (server["weights_digest"], digests)
    assert {device["status"] for device in devices} == {"done"}
    assert {device["log_length"] for device in devices} == {server["rounds"]}
    digest: str = server["weights_digest"]
    return digest

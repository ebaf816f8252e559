"""A broker as a child process: start it, wait until it listens, restart it when it crashes, stop it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from ...protocol.errors import BrokerError
from . import die_with_parent
from .listen_address import client_host

__all__ = ["ChildBroker"]

_log = logging.getLogger(__name__)

_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 5.0
_LOG_LINES = 50
_RESTART_BASE_S = 0.5
_RESTART_CAP_S = 30.0
_STABLE_AFTER_S = 60.0
_MOST_CRASHES = 8  # in a row, none of them after a stable minute


class ChildBroker:
    """One supervised child process that listens on a TCP port.

    A thread starts it, reads its output and waits for its end, so that the kernel's parent-death signal, which means
    the thread that forked, lasts as long as the child should. Ctrl-C does not reach the child: the server decides.
    """

    def __init__(self, program: Sequence[str], *, name: str, host: str, port: int, user: str = "") -> None:
        """Prepare; nothing runs yet.

        Args:
            program: Absolute path and arguments.
            name: For messages.
            host: Where it will listen.
            port: Likewise, not 0.
            user: System user to run as; empty for the own one.
        """
        self._program = list(program)
        self._name = name
        self._host = client_host(host)
        self._port = port
        self._user = user
        self._lines: deque[str] = deque(maxlen=_LOG_LINES)
        self._starting = threading.Lock()  # held from the check for a stop to the fork
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._listening = False  # the first start succeeded
        self._failure: str | None = None
        self._gave_up: str | None = None
        self._input = b""

    @property
    def pid(self) -> int | None:
        """Process id of the running child."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self, first_input: bytes = b"") -> None:
        """Start the child and wait until its port accepts connections.

        Args:
            first_input: Written to its standard input, also after a restart; then the pipe stays open.

        Raises:
            BrokerError: It ended or did not listen in time; the message has its last words.
        """
        if self._thread is not None:
            return
        self._input, self._listening, self._failure, self._gave_up = first_input, False, None, None
        self._stopping.clear()
        self._lines.clear()
        self._thread = threading.Thread(target=self._supervise, name=f"supervise-{self._name}", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + _START_TIMEOUT_S
        while self._failure is None and time.monotonic() < deadline:
            if self._process is not None and _listens(self._host, self._port):
                self._listening = True
                if self.pid is not None:
                    return
            time.sleep(0.02)
        reason = self._failure
        if reason is None:
            reason = (
                f"{self._name} did not listen on port {self._port} within {_START_TIMEOUT_S:g} s{self._last_words()}"
            )
        self.stop()
        raise BrokerError(f"the broker cannot be started: {reason}")

    def send_input(self, data: bytes) -> None:
        """Write to the child's standard input."""
        process = self._process
        if process is not None and process.stdin is not None:
            try:
                process.stdin.write(data)
                process.stdin.flush()
            except (BrokenPipeError, ValueError):
                pass  # it just died; the supervisor knows

    def replace_input(self, first_input: bytes) -> None:
        """Write another first input, to the running child and to those that follow a crash."""
        self._input = first_input
        self.send_input(first_input)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the child."""
        process = self._process
        if process is not None:
            process.send_signal(number)

    def stop(self) -> None:
        """Terminate the child, kill it when that takes too long. Idempotent."""
        with self._starting:
            self._stopping.set()
        process, thread = self._process, self._thread
        if process is not None:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_STOP_TIMEOUT_S)
            self._thread = None

    def alive(self) -> bool:
        """Whether the child runs and its port accepts connections."""
        return self.pid is not None and _listens(self._host, self._port)

    def failure(self) -> str | None:
        """Say how the child died for good; None while it runs, and while it is being restarted."""
        return self._gave_up

    def _supervise(self) -> None:
        crashes = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            code = self._run_once()
            if self._stopping.is_set():
                break
            self._failure = f"{self._name} ended with {_describe(code)}{self._last_words()}"
            crashes = 1 if time.monotonic() - started >= _STABLE_AFTER_S else crashes + 1
            if not self._listening:  # `start` waits, and reports
                break
            if crashes >= _MOST_CRASHES:
                self._gave_up = f"{self._failure}; it crashed {crashes} times in a row and is not started again"
                _log.error("%s", self._gave_up)
                break
            delay_s = min(_RESTART_CAP_S, _RESTART_BASE_S * 2.0 ** (crashes - 1))
            _log.error("%s; starting it again in %.1f s", self._failure, delay_s)
            self._stopping.wait(delay_s)

    def _run_once(self) -> int:
        tie = [sys.executable, "-I", "-S", str(Path(die_with_parent.__file__)), str(os.getpid()), self._user]
        with self._starting:
            if self._stopping.is_set():
                return 0
            process = subprocess.Popen(
                tie + self._program,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                start_new_session=True,
                cwd="/",
            )
            self._process = process
        with process:
            self.send_input(self._input)
            assert process.stdout is not None
            for line in process.stdout:
                text = line.decode("utf-8", "replace").rstrip()
                self._lines.append(text)
                _log.debug("%s: %s", self._name, text)
            return process.wait()

    def _last_words(self) -> str:
        lines = [line for line in self._lines if line.strip()][-4:]
        return "; its last words: " + " | ".join(lines) if lines else ""


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"

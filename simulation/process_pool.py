"""Executors in processes of their own, one a core."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..protocol.device_side.device_events import Task
from ..protocol.errors import ConfigError, FedzoError
from ..protocol.pruning.mask import Mask
from .pools import added
from .work import Executor, Job, StoredJob, Usage, WorkResult, batches_of, run_error

__all__ = ["ProcessPool"]

WINDOW = 8  # calls on their way to a process: it never waits for work, and pipes never fill up
CLOSE_S = 5.0
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class ProcessPool:
    """Processes that are started anew (``spawn``); device ``i`` belongs to process ``i % n``.

    Args:
        processes: How many; 0 for one a core that this process may use.

    Raises:
        ConfigError: ``processes`` is negative.
    """

    def __init__(self, processes: int = 0) -> None:
        if processes < 0:
            raise ConfigError(f"the number of processes is {processes}, it must be 0 or more")
        self.processes = processes or len(os.sched_getaffinity(0))
        self._workers: list[_Worker] = []
        self._answers: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._tickets: list[int] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self, job: Job) -> None:
        """See :meth:`.pools.WorkPool.start`."""
        self._folder = tempfile.TemporaryDirectory(prefix="fedzo-simulation-")
        stored = StoredJob.of(job, Path(self._folder.name))
        with _one_thread_each():
            self._workers = [_Worker(number, stored, self._answers) for number in range(self.processes)]
        self._everywhere("usage")  # they are up, or say why not

    def prepare(self, key: str, mask: Mask) -> None:
        """See :meth:`.pools.WorkPool.prepare`."""
        for worker in self._workers:
            worker.call("prepare", key, mask)

    def share(self, key: bytes, weights: NDArray[np.float32]) -> None:
        """See :meth:`.pools.WorkPool.share`."""
        for worker in self._workers:
            worker.call("share", key, weights)

    def submit(self, ticket: int, device: int, task: Task, mask_key: str, key: bytes, micro_batch: int) -> None:
        """See :meth:`.pools.WorkPool.submit`."""
        self._tickets.append(ticket)
        self._workers[device % self.processes].call("compute", ticket, device, task, mask_key, key, micro_batch)

    def forget(self, device: int, round_: int) -> None:
        """See :meth:`.pools.WorkPool.forget`."""
        self._workers[device % self.processes].call("forget", device, round_)

    def give_back(self, device: int, round_: int) -> None:
        """See :meth:`.pools.WorkPool.give_back`."""
        self._workers[device % self.processes].call("give_back", device, round_)

    def collect(self) -> list[WorkResult]:
        """See :meth:`.pools.WorkPool.collect`."""
        found: dict[int, WorkResult] = {}
        while len(found) < len(self._tickets):
            _, answer = self._next()
            found[answer.ticket] = answer
        tickets, self._tickets = self._tickets, []
        return [found[ticket] for ticket in tickets]

    def evaluate(self, mask_key: str, key: bytes, n_samples: int) -> tuple[float, int, int]:
        """See :meth:`.pools.WorkPool.evaluate`."""
        batches = batches_of(n_samples)
        cuts = [batches * number // self.processes for number in range(self.processes + 1)]
        for number, worker in enumerate(self._workers):
            worker.call("evaluate", mask_key, key, cuts[number], cuts[number + 1])
        parts = dict(self._next() for _ in self._workers)
        return added([part for number in range(self.processes) for part in parts[number]])

    def usage(self) -> Usage:
        """See :meth:`.pools.WorkPool.usage`."""
        return sum(self._everywhere("usage"), Usage())

    def close(self) -> None:
        """See :meth:`.pools.WorkPool.close`."""
        for worker in self._workers:
            worker.end()
        for worker in self._workers:
            worker.join()
        self._workers, self._tickets = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _everywhere(self, name: str) -> list[Any]:
        for worker in self._workers:
            worker.call(name)
        answers = dict(self._next() for _ in self._workers)
        return [answers[number] for number in range(self.processes)]

    def _next(self) -> tuple[int, Any]:
        number, answer = self._answers.get()
        if isinstance(answer, FedzoError):
            raise answer
        return number, answer


class _Worker:
    """One process and the calls that wait for it.

    A thread takes the answers and sends the next call for each, so that neither side ever waits for the other to read.
    """

    def __init__(self, number: int, job: StoredJob, answers: queue.SimpleQueue[tuple[int, Any]]) -> None:
        self._number, self._answers = number, answers
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        name = f"fedzo-simulation-{number}"
        self._process = context.Process(target=_serve, args=(theirs, job), name=name, daemon=True)
        self._process.start()
        theirs.close()
        self._lock = threading.Lock()
        self._calls: deque[tuple[Any, ...]] = deque()
        self._under_way = 0
        self._is_ending = False
        self._reader = threading.Thread(target=self._read, name=name, daemon=True)
        self._reader.start()

    def call(self, *call: Any) -> None:
        with self._lock:
            if self._under_way < WINDOW:
                self._send(call)
            else:
                self._calls.append(call)

    def _send(self, call: tuple[Any, ...]) -> None:
        self._under_way += 1
        with contextlib.suppress(OSError):  # It is gone; the reader says so.
            self._connection.send(call)

    def _read(self) -> None:
        try:
            while True:
                answer = self._connection.recv()
                with self._lock:
                    self._under_way -= 1
                    if self._calls:
                        self._send(self._calls.popleft())
                if answer is not None:
                    self._answers.put((self._number, answer))
        except (EOFError, OSError):
            if not self._is_ending:
                self._answers.put((self._number, self._death()))

    def _death(self) -> FedzoError:
        self._process.join(CLOSE_S)
        code = self._process.exitcode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        hint = "see the kernel's log for what ended it; with too little memory use fewer processes"
        return FedzoError(f"a process of the simulation was ended {how}", hint=hint)

    def end(self) -> None:
        self._is_ending = True
        with self._lock:
            self._calls.clear()
        with contextlib.suppress(OSError, ValueError):
            self._connection.send(None)

    def join(self) -> None:
        self._process.join(CLOSE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._reader.join(CLOSE_S)
        self._connection.close()


def _serve(connection: Connection, job: StoredJob) -> None:
    """Body of a process: one answer a call, None for nothing to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends this process
    executor: Executor | None = None
    with contextlib.suppress(EOFError, OSError):
        while (call := connection.recv()) is not None:
            try:
                executor = executor or Executor(job.open())
                answer = getattr(executor, call[0])(*call[1:])
            except Exception as error:  # noqa: BLE001 (whatever it is, the parent has to learn of it)
                answer = run_error(error)
            connection.send(answer)
    if executor is not None:
        executor.close()


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Children inherit the environment: their linear algebra must not use more threads than there are cores."""
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(_ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

"""What one process computes with: one engine, one estimator, and the residuals of the devices that stick to it."""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..edge_runtime.datasets.data import Samples
from ..edge_runtime.estimation.estimators import never
from ..edge_runtime.inference.engine import Engine
from ..edge_runtime.inference.ort import sessions_kept
from ..edge_runtime.inference.variants import wanted_variants
from ..edge_runtime.planning.memory import peak_rss_mib
from ..edge_runtime.round_work import RoundWork, decline_of
from ..edge_runtime.storage.artifact import load_artifact
from ..edge_runtime.storage.residual_file import Residual
from ..protocol.artifact.manifest import Manifest
from ..protocol.device_side.device_events import Outcome, Task
from ..protocol.errors import FedzoError
from ..protocol.pruning.mask import Mask
from ..protocol.wire.documents import RunDocument, parse
from .clients import Clients, StoredSamples

__all__ = ["Executor", "Job", "Usage", "WorkResult"]

KEPT_WEIGHTS = 4
KEPT_ENGINES = 2
EVALUATION_BATCH = 64


@dataclass(frozen=True, eq=False)
class Job:
    """What every process of a simulation needs to know once.

    Attributes:
        artifact: Its folder.
        run: The encoded run document.
        clients: Samples of the devices.
        test: The server's own test set.
        many_queries: Whether to evaluate several sets of weights in one run.
    """

    artifact: str
    run: bytes
    clients: Clients
    test: Samples | None
    many_queries: bool


@dataclass(frozen=True, eq=False)
class StoredJob:
    """A job as it goes to another process: samples are named, not copied.

    Attributes:
        artifact: See :class:`Job`.
        run: See :class:`Job`.
        samples: Of all devices.
        train: See :class:`~.clients.Clients`.
        held: ``test`` there.
        test: See :class:`Job`.
        many_queries: See :class:`Job`.
    """

    artifact: str
    run: bytes
    samples: StoredSamples
    train: list[NDArray[np.int64]]
    held: list[NDArray[np.int64]]
    test: StoredSamples | None
    many_queries: bool

    @classmethod
    def of(cls, job: Job, folder: Path) -> StoredJob:
        """Write what lies in no file to ``folder``."""
        samples = StoredSamples.of(job.clients.samples, folder, "samples")
        test = StoredSamples.of(job.test, folder, "test") if job.test is not None else None
        return cls(job.artifact, job.run, samples, job.clients.train, job.clients.test, test, job.many_queries)

    def open(self) -> Job:
        """Map the samples."""
        clients = Clients(self.samples.open(), self.train, self.held)
        test = self.test.open() if self.test is not None else None
        return Job(self.artifact, self.run, clients, test, self.many_queries)


@dataclass(frozen=True, eq=False)
class WorkResult:
    """What came of one task.

    Attributes:
        ticket: Of the task.
        outcome: What the device reports.
        sample_passes: Samples sent through the network; parts of it count by their multiplications.
    """

    ticket: int
    outcome: Outcome
    sample_passes: float


@dataclass(frozen=True, slots=True)
class Usage:
    """What computing took so far.

    Attributes:
        engine_s: Wall time inside engines, summed over processes: putting weights in place, and forward passes.
        engine_cpu_s: Processor time inside engines, likewise.
        forward_cpu_s: The part of it inside ONNX Runtime.
        work_cpu_s: Processor time inside tasks, likewise: engines, directions, batches, sketches.
        cpu_s: Processor time of the processes, likewise; without this one.
        peak_rss_mib: Peak memory of the processes, likewise; what they share is counted in each, this one in none.
    """

    engine_s: float = 0.0
    engine_cpu_s: float = 0.0
    forward_cpu_s: float = 0.0
    work_cpu_s: float = 0.0
    cpu_s: float = 0.0
    peak_rss_mib: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


class _Stopwatch:
    """Adds up wall time and processor time; what is timed inside itself counts once."""

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = 0.0
        self._depth = 0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, with its time counted."""

        def run(*arguments: Any, **named: Any) -> Any:
            self._depth += 1
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return call(*arguments, **named)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.wall_s += time.perf_counter() - wall
                    self.cpu_s += time.thread_time() - cpu

        return run


class _TimedSession:
    """A session whose runs are timed."""

    def __init__(self, session: Any, *watches: _Stopwatch) -> None:
        self._session = session
        self.run_with_iobinding = session.run_with_iobinding
        for watch in watches:
            self.run_with_iobinding = watch.timed(self.run_with_iobinding)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


@dataclass(eq=False)
class _Open:
    """An engine with what is computed on it."""

    engine: Engine
    work: RoundWork


class Executor:
    """Computes tasks one after another. Owned by one thread.

    Args:
        job: Of the simulation.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._run = parse(RunDocument, job.run)
        self._artifact = load_artifact(job.artifact)
        self._passes, self._engines, self._tasks = _Stopwatch(), _Stopwatch(), _Stopwatch()
        self._keeper = sessions_kept(lambda session: _TimedSession(session, self._passes, self._engines))
        self._keeper.__enter__()
        self._masks: dict[str, Mask] = {}
        self._weights: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._open: OrderedDict[tuple[str, int], _Open] = OrderedDict()
        self._residuals: dict[int, Residual] = {}
        self._earlier: dict[int, Residual | None] = {}

    def prepare(self, key: str, mask: Mask) -> None:
        """Know a mask by a name."""
        self._masks[key] = mask

    def share(self, key: bytes, weights: NDArray[np.float32]) -> None:
        """Know some weights; the last few are kept."""
        self._weights[key] = weights
        self._weights.move_to_end(key)
        while len(self._weights) > KEPT_WEIGHTS:
            self._weights.popitem(last=False)

    def compute(self, ticket: int, device: int, task: Task, mask_key: str, key: bytes, micro_batch: int) -> WorkResult:
        """Do one task of one device.

        Args:
            ticket: Comes back with the result.
            device: Whose samples and residual count.
            task: What to measure; without weights.
            mask_key: Of the mask, see :meth:`prepare`.
            key: Of the weights, see :meth:`share`.
            micro_batch: Samples of one run of a graph.

        Raises:
            FedzoError: The engine cannot be opened.
        """
        opened = self._opened(mask_key, micro_batch)
        opened.engine.sample_passes = 0.0
        task = dataclasses.replace(task, weights=self._weights[key])
        dataset = self._job.clients.dataset(device)
        residual = self._residuals.get(device)
        try:
            measured = self._tasks.timed(opened.work.measure)(task, dataset, residual, never)
        except Exception as error:  # noqa: BLE001 (a device says in its report why it does not answer)
            decline, detail = decline_of(error, task.round)
            outcome = Outcome((), 0, decline=decline, detail=detail)
        else:
            if measured.residual is not None:
                self._keep(device, measured.residual)
            queries = measured.queries
            outcome = Outcome(measured.blocks, measured.samples, measured.mean_loss, queries)
        return WorkResult(ticket, outcome, opened.engine.sample_passes)

    def forget(self, device: int, round_: int) -> None:
        """What the device measured in a round was never ready: it goes on as if it had not begun."""
        residual = self._residuals.get(device)
        if residual is not None and residual.round == round_:
            before = self._earlier.get(device)
            if before is None:
                del self._residuals[device]
            else:
                self._residuals[device] = before

    def give_back(self, device: int, round_: int) -> None:
        """What the device sent in a round did not count: its residual gets it back."""
        residual = self._residuals.get(device)
        if residual is not None and residual.round == round_:
            self._residuals[device] = dataclasses.replace(residual, is_lost=True)

    def evaluate(self, mask_key: str, key: bytes, first: int, stop: int) -> list[tuple[float, int, int]]:
        """Loss sum, correct answers and samples of some batches of the server's test set, by number.

        Args:
            mask_key: See :meth:`compute`.
            key: See :meth:`compute`.
            first: First batch.
            stop: The batch behind the last one.
        """
        assert self._job.test is not None
        test = self._job.test
        engine = self._opened(mask_key, EVALUATION_BATCH).engine
        found = []
        for number in range(first, stop):
            rows = np.arange(number * EVALUATION_BATCH, min((number + 1) * EVALUATION_BATCH, len(test)))
            batch = test.batch(rows)
            found.append(self._tasks.timed(engine.evaluate)(self._weights[key], batch.x, batch.y))
        return found

    def usage(self) -> Usage:
        """What it took so far."""
        engines, passes, tasks = self._engines, self._passes, self._tasks
        return Usage(engines.wall_s, engines.cpu_s, passes.cpu_s, tasks.cpu_s, time.process_time(), peak_rss_mib())

    def close(self) -> None:
        """Unload everything."""
        self._open.clear()
        self._keeper.__exit__(None, None, None)

    @property
    def _manifest(self) -> Manifest:
        return self._artifact.manifest

    def _keep(self, device: int, residual: Residual) -> None:
        self._earlier[device] = self._residuals.get(device)
        self._residuals[device] = residual

    def _opened(self, mask_key: str, micro_batch: int) -> _Open:
        key = (mask_key, micro_batch)
        if key not in self._open:
            queries = self._queries()
            mask = self._masks[mask_key]
            engine = Engine(self._artifact, mask, threads=1, micro_batch=micro_batch, queries=queries)
            if not self._open:
                engine.check_golden()
            for name in ("losses", "loss", "evaluate"):
                setattr(engine, name, self._engines.timed(getattr(engine, name)))
            self._open[key] = _Open(engine, RoundWork(self._run, engine, mask_key))
            if queries > 1:
                # Now, so that what the comparison of the graphs costs is no part of a task.
                train = self._job.clients.dataset(0).train
                batch = train.batch(np.arange(min(len(train), self._run.training.batch), dtype=np.int64))
                engine.query_batches.chosen(batch.x, batch.y)
            while len(self._open) > 2 * KEPT_ENGINES:
                self._open.popitem(last=False)[1].engine.close()
        return self._open[key]

    def _queries(self) -> int:
        """The same in every process, whatever a clock says: results must not depend on who computes them."""
        if not self._job.many_queries:
            return 1
        return max((variant.queries for variant in wanted_variants(self._manifest)), default=1)


def batches_of(n_samples: int) -> int:
    """Batches of a test set."""
    return -(-n_samples // EVALUATION_BATCH)


def run_error(error: Exception) -> FedzoError:
    """What went wrong in a process, as it is raised in another."""
    return error if isinstance(error, FedzoError) else FedzoError(f"unexpected {type(error).__name__}: {error}")

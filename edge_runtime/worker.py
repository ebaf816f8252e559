"""The thread that computes: plans memory, opens the engine, measures. Whatever goes wrong becomes an answer.

Commands are carried out one after another, in the order in which they were given. Each gets exactly one answer, but for
those that give a residual back what did not count.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

from ..protocol.device_side.device_events import (
    Compute,
    Computed,
    DeviceEvent,
    Failed,
    GiveBack,
    Outcome,
    OverBudget,
    Plan,
    Planned,
    Prepare,
    Prepared,
    Task,
)
from ..protocol.device_side.run_files import needed_graphs
from ..protocol.errors import FedzoError
from ..protocol.wire.messages import Decline, ReportKind
from .datasets.data import Dataset
from .estimation.estimators import Cancelled
from .inference.engine import Engine
from .inference.ort import release_arena, runtime, sessions_kept
from .inference.providers import CPU
from .planning.fence import Fence
from .planning.memory import MemoryPlan, peak_rss_mib
from .planning.run_plan import Limits, plan_run
from .round_work import Measured, RoundWork, as_over_budget, decline_of
from .storage.artifact import Artifact, BlobStore
from .storage.residual_file import Residual, ResidualFile

__all__ = ["Limits", "Worker"]

_log = logging.getLogger(__name__)


class Worker:
    """Carries out :class:`Plan`, :class:`Prepare` and :class:`Compute` on a thread of its own.

    Args:
        load_data: Gives the device's samples for an input shape and a number of classes; called on the thread.
        blobs: The store that holds manifest and graphs when an engine is opened.
        answer: Takes the answers; called on the thread, so it must be safe for that.
        limits: What the board allows.
        residuals: Keeps what an estimator has not sent yet; None to begin anew after every start.

    Attributes:
        plans: The memory plans of the latest run's phases, once it was planned; replaced, never changed.
        layout: What the latest losses were computed with, see :class:`~.inference.engine.Engine`; empty at first.
    """

    def __init__(
        self,
        load_data: Callable[[tuple[int, ...], int], Dataset],
        blobs: BlobStore,
        answer: Callable[[DeviceEvent], None],
        limits: Limits,
        residuals: ResidualFile | None = None,
    ) -> None:
        self._residuals = residuals
        self._load_data, self._blobs, self._answer, self._limits = load_data, blobs, answer, limits
        self.plans: tuple[MemoryPlan, ...] = ()
        self.layout = ""
        self._commands: queue.SimpleQueue[Plan | Prepare | Compute | GiveBack | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="fedzo-worker", daemon=True)
        self._submitted = 0
        self._cancelled = 0  # tasks up to this number are not wanted; written by the caller, read by the thread
        self._closing = False
        # Of the thread alone:
        self._fence = Fence()
        self._dataset: tuple[tuple[int, ...], int, Dataset] | None = None
        self._work: RoundWork | None = None
        self._residual: Residual | None = None
        self._lost_round = -1
        self._kept, self._keeps = ExitStack(), False
        self._arena_bytes = 0
        self._is_lowered = False
        self._has_batches = False
        self._tested: set[bytes] = set()

    @property
    def loading(self) -> str:
        """How the latest plan treats graphs, in words."""
        return "graphs stay loaded" if self._keeps else "one graph at a time"

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, command: Plan | Prepare | Compute | GiveBack) -> None:
        """Queue a command; its answer is given later, but for :class:`GiveBack`."""
        if isinstance(command, Compute):
            self._submitted = command.task.number
        self._commands.put(command)

    def cancel(self) -> None:
        """Every task given so far is no longer wanted; its answer will say so if it has not ended before."""
        self._cancelled = self._submitted

    def close(self, timeout_s: float = 5.0) -> None:
        """Cancel what runs and end the thread; a single forward pass that takes longer is left behind."""
        self._closing = True
        self.cancel()
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    # --- on the thread ----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while (command := self._commands.get()) is not None:
            if self._closing:
                break
            if isinstance(command, GiveBack):
                self._lost_round = command.round
                self._give_back()
                continue
            if isinstance(command, Compute):
                self._answer(Computed(command.task.number, self._outcome(command.task)))
                continue
            try:
                answer: DeviceEvent = self._plan(command) if isinstance(command, Plan) else self._prepare(command)
            except Exception as error:  # noqa: BLE001 (whatever it is, the server has to learn of it)
                answer = self._failure(command, error)
            self._answer(answer)
        self._release()
        self._fence.lift()

    def _failure(self, command: Plan | Prepare, error: Exception) -> DeviceEvent:
        """The answer to what failed; an engine that needs too much memory may still fit with a smaller micro-batch."""
        run, over = command.run.run, as_over_budget(error)
        if over is not None and isinstance(command, Prepare):
            release_arena()
            return OverBudget(run, over.message)
        if over is not None:
            return Failed(over, run)
        if isinstance(error, FedzoError):
            return Failed(error, run)
        _log.error("%s failed", type(command).__name__.lower(), exc_info=error)
        return Failed(FedzoError(f"unexpected {type(error).__name__}: {error}"), run)

    def _release(self) -> None:
        if self._work is not None:
            self._unload()
            self._work = None
            release_arena()

    def _unload(self) -> None:
        """Give back what graphs take; from now on one is loaded at a time."""
        self._kept.close()
        if self._work is not None:
            self._work.engine.close()

    def _data(self, input_shape: tuple[int, ...], n_classes: int) -> Dataset:
        if self._dataset is None or self._dataset[:2] != (input_shape, n_classes):
            self._dataset = None  # The old one is freed before the new one is loaded.
            self._dataset = (input_shape, n_classes, self._load_data(input_shape, n_classes))
        return self._dataset[2]

    def _plan(self, command: Plan) -> Planned:
        self._release()
        self._fence.lift()
        self.plans = ()
        manifest, settings = command.manifest, command.run.settings
        dataset = self._data(manifest.input_shape, manifest.n_classes)
        plans, files = plan_run(manifest, settings, dataset, self._limits, self._limits.micro_batch)
        peak_mib, micro_batch = max(p.planned_peak_mib for p in plans), min(p.micro_batch for p in plans)
        self._arena_bytes = max(p.arena_bytes for p in plans)
        self._is_lowered = command.micro_batch is not None and command.micro_batch < micro_batch
        if self._is_lowered:
            # The larger plan fits the budget and did not hold: a smaller micro-batch gets the same arena, and the
            # portable graph, which needs less of it.
            plans, files = plan_run(manifest, settings, dataset, self._limits, command.micro_batch)[0], ()
        self.plans = plans
        self._keeps = plans[0].keeps_graphs and not self._is_lowered
        self._has_batches = any(v.queries > 1 and v.file in files for v in command.manifest.variants)
        return Planned(command.run.run, peak_mib, min(p.micro_batch for p in plans), files)

    def _prepare(self, command: Prepare) -> Prepared:
        self._release()
        run, manifest = command.run, command.manifest
        if self._limits.fence and self._limits.providers[:1] == (CPU,):
            runtime()  # under a limit its import could end the process
            growth_mib = max(p.anonymous_mib - p.process_mib for p in self.plans)
            self._fence.set(growth_mib, threads=self._limits.threads)
        artifact = Artifact.from_blobs(
            self._blobs.get(bytes.fromhex(run.manifest_sha256)),
            self._blobs,
            {graph.name for graph in needed_graphs(manifest, run.settings)},
        )
        trains = bool(command.mask_sha256 or not run.settings.sparsity)  # else it scores, and computes no losses
        engine = Engine(
            artifact,
            command.mask,
            threads=self._limits.threads,
            micro_batch=min(p.micro_batch for p in self.plans),
            arena_bytes=self._arena_bytes,
            layout="portable" if self._is_lowered or not trains else "auto",
            queries="auto" if self._has_batches else 1,
            providers=self._limits.providers,
            strict_providers=self._limits.strict_providers,
        )
        keeps = self._keeps and trains
        if keeps or artifact.digest not in self._tested:
            engine.check_golden()  # with graphs of its own, which shall not stay
            self._tested.add(artifact.digest)
        engine.check_variant()  # while there are no directions beside it
        self._work = RoundWork(run, engine, command.mask_sha256)
        if self._residual is None or self._residual.key != self._work.key:
            self._residual = self._residuals.load(self._work.key, run.run) if self._residuals is not None else None
            self._give_back()  # The receipt of an earlier session's report may have come before.
        if keeps:  # last, as nothing after it can fail
            self._kept.enter_context(sessions_kept())
        return Prepared(run.run, command.mask_sha256)

    def _give_back(self) -> None:
        """The report of the lost round did not count; what it carried belongs to the residual again."""
        residual = self._residual
        if residual is not None and residual.round == self._lost_round and not residual.is_lost:
            self._residual = dataclasses.replace(residual, is_lost=True)
            if self._residuals is not None:
                self._residuals.save(self._residual)

    def _outcome(self, task: Task) -> Outcome | None:
        started = time.monotonic()
        decline, detail, measured = Decline.FAILED, "", None
        try:
            measured = self._measure(task)
        except Cancelled:
            return None
        except Exception as error:  # noqa: BLE001 (whatever it is, the server has to learn of it)
            decline, detail = decline_of(error, task.round)
            if decline is Decline.OVER_BUDGET:
                self._unload()
                release_arena()  # also of a graph that no engine holds
        elapsed_ms = min(round(1e3 * (time.monotonic() - started)), 0xFFFFFFFF)
        peak_rss_kib = round(1024 * peak_rss_mib())
        if measured is None:
            return Outcome((), 0, elapsed_ms=elapsed_ms, peak_rss_kib=peak_rss_kib, decline=decline, detail=detail)
        return Outcome(
            measured.blocks, measured.samples, measured.mean_loss, measured.queries, elapsed_ms, peak_rss_kib
        )

    def _measure(self, task: Task) -> Measured:
        def cancelled() -> bool:
            return task.number <= self._cancelled

        work = self._work
        if cancelled():
            raise Cancelled(f"round {task.round} was cancelled")
        if work is None or self._dataset is None:
            raise FedzoError(f"round {task.round} has no engine")
        result = work.measure(task, self._dataset[2], self._residual, cancelled)
        if task.kind is ReportKind.PROBE:
            self.layout = work.engine.layout
        if result.residual is not None:
            self._residual = result.residual
            if self._residuals is not None:
                self._residuals.save(self._residual)
        return result

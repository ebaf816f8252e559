"""What a task asks for, measured with an engine that is open: scores, scalars or an evaluation.

It knows nothing of threads, files or messages, so one of it can serve many devices of a process in turn: whose samples
and whose residual count is said with every task.
"""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..protocol.device_side.device_events import Task
from ..protocol.errors import DataError, FedzoError, MemoryBudgetError, ProtocolError
from ..protocol.perturbation.blocks import blocks_of
from ..protocol.pruning.saliency import gaussian_inputs
from ..protocol.wire.documents import RunDocument
from ..protocol.wire.messages import Decline, ReportKind
from .datasets.data import Batch, Dataset, batch_indices
from .estimation.block_estimators import ProbeRequest, make_estimator
from .estimation.estimators import Cancelled
from .estimation.saliency import UnitShiftScorer
from .inference.engine import Engine
from .inference.loss import NonFiniteLossError
from .storage.residual_file import Residual, carried_by, residual_key

__all__ = ["Measured", "NoSamplesError", "RoundWork", "as_over_budget", "decline_of"]

_log = logging.getLogger(__name__)


class NoSamplesError(DataError):
    """The task needs samples that this device does not hold."""


@dataclass(frozen=True, eq=False)
class Measured:
    """The good end of a task.

    Attributes:
        blocks: Scalars ``float32[n]``.
        samples: Samples behind each of them.
        mean_loss: At the unperturbed weights.
        queries: Forward passes.
        residual: What the estimator keeps for the next round, with what it had before this one; None for nothing.
    """

    blocks: tuple[NDArray[np.float32], ...]
    samples: int
    mean_loss: float
    queries: int
    residual: Residual | None = None


class RoundWork:
    """The work of one run under one mask.

    Args:
        run: The run.
        engine: Open for the mask; closed by the caller.
        mask_sha256: Hex hash of the encoded mask, or empty for the dense mask.

    Attributes:
        run: The run.
        engine: The engine.
        key: Names run and mask in residuals.
    """

    def __init__(self, run: RunDocument, engine: Engine, mask_sha256: str) -> None:
        training, saliency, seed = run.training, run.saliency, run.settings.seed
        manifest = engine.artifact.manifest
        self.run, self.engine, self.key = run, engine, residual_key(run, mask_sha256)
        # Directions of its own: those of a machine's replica cache rows and may belong to another thread.
        self._blocks = blocks_of(training, manifest, engine.mask)
        self._estimator = make_estimator(training, self._blocks, seed)
        self._fresh = self._estimator.state()
        self._scorer = UnitShiftScorer(manifest, shift=saliency.shift, draws=saliency.draws, seed=seed)

    def measure(
        self, task: Task, dataset: Dataset, residual: Residual | None, cancelled: Callable[[], bool]
    ) -> Measured:
        """Do one task.

        Args:
            task: What to measure.
            dataset: The device's samples.
            residual: What the device kept, if it kept anything.
            cancelled: Asked before every pass.

        Raises:
            Cancelled: ``cancelled`` returned true.
            NonFiniteLossError: The weights have diverged.
            NoSamplesError: The device holds no samples for it.
            MemoryBudgetError: The tensors do not fit under the engine's limit.
        """
        if task.kind is ReportKind.SALIENCY:
            return self._score(task, dataset, cancelled)
        if task.kind is ReportKind.PROBE:
            return self._probe(task, dataset, residual, cancelled)
        return self._evaluate(task, dataset, cancelled)

    def _score(self, task: Task, dataset: Dataset, cancelled: Callable[[], bool]) -> Measured:
        settings, seed = self.run.saliency, self.run.settings.seed
        if settings.inputs == "data":
            indices = batch_indices(seed, task.round, task.ordinal, len(dataset.train), settings.samples)
            x = dataset.train.batch(indices).x
        else:
            x = gaussian_inputs(self.engine.artifact.manifest, seed, task.round, task.ordinal, settings.samples)
        result = self._scorer.score(self.engine, task.weights, x, task.round, cancelled)
        return Measured(result.blocks, len(x), 0.0, result.passes)

    def _probe(
        self, task: Task, dataset: Dataset, residual: Residual | None, cancelled: Callable[[], bool]
    ) -> Measured:
        settings, train = self.run.training, dataset.train
        seed, first = self.run.settings.seed, task.round * settings.local_steps

        def draw(step: int) -> Batch:
            return train.batch(batch_indices(seed, first + step, task.ordinal, len(train), settings.batch))

        before, batch = self._restored(residual, task), draw(0)
        request = ProbeRequest(task.weights, batch, task.round, task.ordinal, task.positions, task.sigma, later=draw)
        result = self._estimator.probe(self.engine, request, cancelled)
        after = self._estimator.state()
        kept = None
        if after:
            kept = Residual(self.key, task.round, before, after, task.log_length, self._carried(task, result.blocks))
        return Measured(result.blocks, len(batch), result.mean_loss, result.queries, kept)

    def _carried(self, task: Task, scalars: Sequence[NDArray[np.float32]]) -> bytes:
        """What the scalars of all sketches took out of their residuals, which lie one behind the other."""
        start, places, values = 0, [], []
        for block, positions, row in zip(self._blocks, task.positions, scalars, strict=True):
            if block.kind == "sketch":
                places.append(start + positions)
                values.append(row)
                start += block.size
        return carried_by(places, values)

    def _restored(self, residual: Residual | None, task: Task) -> bytes:
        """Put the estimator into the state from which a round is measured, also when it is measured again."""
        is_ours = residual is not None and residual.key == self.key
        state = (
            residual.state_for(task.round, task.log_length, task.recent) if residual is not None and is_ours else b""
        )
        try:
            self._estimator.restore(state or self._fresh)
        except ProtocolError as error:
            _log.warning("what had not been sent is dropped: %s", error.message)
            self._estimator.restore(self._fresh)
        return self._estimator.state()

    def _evaluate(self, task: Task, dataset: Dataset, cancelled: Callable[[], bool]) -> Measured:
        if len(dataset.test) == 0:
            raise NoSamplesError("this device holds no samples out", hint="start it with --holdout 0.2")
        engine, loss_sum, correct, count, queries = self.engine, 0.0, 0, 0, 0
        for batch in dataset.test.batches(engine.micro_batch):
            if cancelled():
                raise Cancelled(f"the evaluation of round {task.round} was cancelled")
            part = engine.evaluate(task.weights, batch.x, batch.y)
            loss_sum, correct, count, queries = loss_sum + part[0], correct + part[1], count + part[2], queries + 1
        with np.errstate(over="ignore"):
            block = np.array([loss_sum, correct, count], dtype=np.float32)
        if not math.isfinite(float(block[0])):
            raise NonFiniteLossError(f"the loss of {count} samples is {loss_sum}: the weights have diverged")
        return Measured((block,), count, loss_sum / count, queries)


def decline_of(error: Exception, round_: int) -> tuple[Decline, str]:
    """Why a device does not answer, for the report and in one line for people.

    Args:
        error: What ended the task; not :class:`~.estimation.estimators.Cancelled`.
        round_: Of the task.
    """
    if isinstance(error, NonFiniteLossError):
        return Decline.NON_FINITE, error.message
    if isinstance(error, NoSamplesError):
        return Decline.NO_DATA, error.message
    over = as_over_budget(error)
    if over is not None:
        return Decline.OVER_BUDGET, over.message
    if isinstance(error, FedzoError):
        return Decline.FAILED, error.message
    _log.error("round %d failed", round_, exc_info=error)
    return Decline.FAILED, f"unexpected {type(error).__name__}: {error}"


def as_over_budget(error: Exception) -> MemoryBudgetError | None:
    """The error, if it says that memory ran out: under the arena's limit, the address space's, or the machine's."""
    if isinstance(error, MemoryBudgetError):
        return error
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return MemoryBudgetError(f"no memory left: {error}".rstrip(": "))
    return None

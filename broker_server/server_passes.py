"""What the server itself computes with the artifact's graphs: evaluations, masks, and scores that it checks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..edge_runtime.datasets.data import Samples
from ..edge_runtime.estimation.estimators import Cancelled
from ..edge_runtime.estimation.saliency import UnitShiftScorer
from ..edge_runtime.inference.engine import Engine
from ..edge_runtime.storage.artifact import Artifact
from ..protocol.pruning.blind_layers import visibility
from ..protocol.pruning.saliency import gaussian_inputs
from ..protocol.pruning.score_checks import largest_difference
from ..protocol.server_side.coordinator_events import (
    CheckScores,
    Evaluate,
    MakeMask,
    MaskMade,
    ScoresChecked,
    ServerEvaluated,
)
from ..protocol.wire.documents import RunDocument
from .synflow import synflow_mask

__all__ = ["ServerPasses"]

MICRO_BATCH = 64


class ServerPasses:
    """Answers the coordinator's commands that need an engine; for one thread.

    Args:
        artifact: Of the run.
        run: Its document.
        test_set: The server's own samples, if it has any.
        threads: Threads within an operator.
        cancelled: Asked between passes; then there is no answer.
    """

    def __init__(
        self,
        artifact: Artifact,
        run: RunDocument,
        test_set: Samples | None = None,
        *,
        threads: int = 1,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self._artifact, self._run, self._test_set = artifact, run, test_set
        self._threads, self._cancelled = threads, cancelled

    def answer(self, command: Evaluate | MakeMask | CheckScores) -> ServerEvaluated | MaskMade | ScoresChecked | None:
        """Compute what a command asks for; None if it was cancelled.

        Raises:
            FedzoError: It cannot be computed.
        """
        if isinstance(command, MakeMask):
            mask = synflow_mask(self._artifact, self._run.settings, threads=self._threads, cancelled=self._cancelled)
            return None if self._cancelled() else MaskMade(mask.encode())
        if isinstance(command, CheckScores):
            return self._check(command)
        return self._evaluate(command)

    def _check(self, command: CheckScores) -> ScoresChecked | None:
        saliency, seed, manifest = self._run.saliency, self._run.settings.seed, self._artifact.manifest
        scorer = UnitShiftScorer(manifest, shift=saliency.shift, draws=saliency.draws, seed=seed)
        x = gaussian_inputs(manifest, seed, command.round, command.ordinal, saliency.samples)
        try:
            with Engine(
                self._artifact, command.mask, threads=self._threads, micro_batch=MICRO_BATCH, queries=1
            ) as engine:
                found = scorer.score(engine, command.weights, x, command.round, self._cancelled)
        except Cancelled:
            return None
        dense = np.zeros(manifest.layout.size, dtype=np.float32)
        dense[command.mask.kept] = command.weights
        noise = visibility(manifest, dense, found.sensitivities, found.moments, saliency.shift).level
        difference = largest_difference(manifest, found.blocks, command.blocks, noise=noise)
        return ScoresChecked(command.round, command.device, difference)

    def _evaluate(self, command: Evaluate) -> ServerEvaluated | None:
        assert self._test_set is not None
        with Engine(self._artifact, command.mask, threads=self._threads, micro_batch=MICRO_BATCH) as engine:
            loss_sum, correct, count = 0.0, 0, 0
            for batch in self._test_set.batches(engine.micro_batch):
                if self._cancelled():
                    return None
                part = engine.evaluate(command.weights, batch.x, batch.y)
                loss_sum, correct, count = loss_sum + part[0], correct + part[1], count + part[2]
        return ServerEvaluated(command.round, loss_sum / count, correct / count, count)

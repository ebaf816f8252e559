"""From the tasks of virtual devices to their outcomes at the right virtual time."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..protocol.device_side.device_events import Outcome, Task
from ..protocol.pruning.mask import Mask
from ..protocol.replay.update import weights_digest
from ..protocol.wire.messages import ReportKind
from .boards import Board
from .clock import Clock
from .pools import WorkPool
from .work import KEPT_WEIGHTS

__all__ = ["Labour"]

_NO_WEIGHTS = np.zeros(0, np.float32)


class Labour:
    """Gives tasks to a pool.

    A task is computed when it is given, and its outcome is there after the virtual time that the board takes. The
    clock must not pass :attr:`horizon` before :meth:`settle`.

    Args:
        pool: Started, and closed, by the caller.
        clock: Virtual time.

    Attributes:
        sample_forwards: Samples sent through the network in training so far.
        scoring_forwards: Those of scoring.
        detail: Why the first task that failed did.
    """

    def __init__(self, pool: WorkPool, clock: Clock) -> None:
        self._pool, self._clock = pool, clock
        self._waiting: list[tuple[float, Board, Task, Callable[[int, Outcome], None]]] = []
        self._shared: OrderedDict[bytes, None] = OrderedDict()
        self._masks: set[str] = set()
        self.sample_forwards = self.scoring_forwards = 0.0
        self.detail = ""

    @property
    def horizon(self) -> float | None:
        """Nothing that was given can be done before; None if nothing was."""
        return self._waiting[0][0] if self._waiting else None

    def submit(self, device: int, board: Board, task: Task, mask: Mask, done: Callable[[int, Outcome], None]) -> None:
        """Start a task.

        Args:
            device: Whose.
            board: What it is computed on.
            task: The task.
            mask: The survivors.
            done: Called with the task's number and outcome when the board is done.
        """
        key, mask_key = self._share(task.weights_digest, task.weights), self._prepare(mask)
        bare = dataclasses.replace(task, weights=_NO_WEIGHTS)
        self._pool.submit(len(self._waiting), device, bare, mask_key, key, board.micro_batch)
        self._waiting.append((self._clock.now, board, bare, done))

    def forget(self, device: int, round_: int) -> None:
        """What a device measured in a round was in vain."""
        self._pool.forget(device, round_)

    def give_back(self, device: int, round_: int) -> None:
        """What a device sent in a round did not count."""
        self._pool.give_back(device, round_)

    def settle(self) -> None:
        """Wait for everything that was given."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        for (started, board, task, done), result in zip(waiting, self._pool.collect(), strict=True):
            if task.kind is ReportKind.PROBE:
                self.sample_forwards += result.sample_passes
            elif task.kind is ReportKind.SALIENCY:
                self.scoring_forwards += result.sample_passes
            self.detail = self.detail or result.outcome.detail
            duration_s = board.duration_s(result.sample_passes)
            outcome = dataclasses.replace(result.outcome, elapsed_ms=min(round(1e3 * duration_s), 0xFFFFFFFF))
            self._clock.at(started + duration_s, done, task.number, outcome)

    def evaluate(self, mask: Mask, weights: NDArray[np.float32], n_samples: int) -> tuple[float, int, int]:
        """Loss sum, correct answers and samples on the server's test set."""
        self.settle()
        key, mask_key = self._share(weights_digest(weights), weights), self._prepare(mask)
        return self._pool.evaluate(mask_key, key, n_samples)

    def _share(self, key: bytes, weights: NDArray[np.float32]) -> bytes:
        if key not in self._shared:
            self._pool.share(key, weights)
            self._shared[key] = None
            if len(self._shared) > KEPT_WEIGHTS:  # as the executors do
                self._shared.popitem(last=False)
        return key

    def _prepare(self, mask: Mask) -> str:
        key = mask.digest.hex()
        if key not in self._masks:
            self._pool.prepare(key, mask)
            self._masks.add(key)
        return key

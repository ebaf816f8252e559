"""Where the work of a simulation is done: the seam, and the pool that needs no other process.

A distributed engine fits behind :class:`WorkPool`: one :class:`~.work.Executor` an actor (Ray) or a worker (Dask),
calls to it in the order in which they were made, and every device always on the same one, since what an estimator
keeps between rounds stays there. Nothing else is asked of it; the results do not depend on the number of executors.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..protocol.device_side.device_events import Task
from ..protocol.pruning.mask import Mask
from .work import Executor, Job, Usage, WorkResult, batches_of

__all__ = ["InlinePool", "WorkPool"]


class WorkPool(Protocol):
    """Carries out the tasks of virtual devices.

    Calls that raise end the simulation; :meth:`close` may be called at any time, and more than once.

    Attributes:
        processes: How many tasks are computed at a time.
    """

    processes: int

    def start(self, job: Job) -> None:
        """Make the executors.

        Raises:
            FedzoError: They cannot be made.
        """
        ...

    def prepare(self, key: str, mask: Mask) -> None:
        """See :meth:`.work.Executor.prepare`; for all executors."""
        ...

    def share(self, key: bytes, weights: NDArray[np.float32]) -> None:
        """See :meth:`.work.Executor.share`; for all executors."""
        ...

    def submit(self, ticket: int, device: int, task: Task, mask_key: str, key: bytes, micro_batch: int) -> None:
        """See :meth:`.work.Executor.compute`; returns at once, on the device's executor."""
        ...

    def forget(self, device: int, round_: int) -> None:
        """See :meth:`.work.Executor.forget`; behind what was submitted before."""
        ...

    def give_back(self, device: int, round_: int) -> None:
        """See :meth:`.work.Executor.give_back`; behind what was submitted before."""
        ...

    def collect(self) -> list[WorkResult]:
        """Wait for everything that was submitted; results in the order of tickets.

        Raises:
            FedzoError: An executor failed, or is gone.
        """
        ...

    def evaluate(self, mask_key: str, key: bytes, n_samples: int) -> tuple[float, int, int]:
        """Loss sum, correct answers and samples of the server's test set; nothing may be submitted meanwhile."""
        ...

    def usage(self) -> Usage:
        """Summed over the executors."""
        ...

    def close(self) -> None:
        """End the executors."""
        ...


class InlinePool:
    """One executor in this process: tasks are computed as they are submitted."""

    processes = 1

    def __init__(self) -> None:
        self._executor: Executor | None = None
        self._results: list[WorkResult] = []

    def start(self, job: Job) -> None:
        """See :meth:`WorkPool.start`."""
        self._results = []
        self._executor = Executor(job)

    @property
    def _one(self) -> Executor:
        assert self._executor is not None, "the pool was not started"
        return self._executor

    def prepare(self, key: str, mask: Mask) -> None:
        """See :meth:`WorkPool.prepare`."""
        self._one.prepare(key, mask)

    def share(self, key: bytes, weights: NDArray[np.float32]) -> None:
        """See :meth:`WorkPool.share`."""
        self._one.share(key, weights)

    def submit(self, ticket: int, device: int, task: Task, mask_key: str, key: bytes, micro_batch: int) -> None:
        """See :meth:`WorkPool.submit`."""
        self._results.append(self._one.compute(ticket, device, task, mask_key, key, micro_batch))

    def forget(self, device: int, round_: int) -> None:
        """See :meth:`WorkPool.forget`."""
        self._one.forget(device, round_)

    def give_back(self, device: int, round_: int) -> None:
        """See :meth:`WorkPool.give_back`."""
        self._one.give_back(device, round_)

    def collect(self) -> list[WorkResult]:
        """See :meth:`WorkPool.collect`."""
        results, self._results = self._results, []
        return results

    def evaluate(self, mask_key: str, key: bytes, n_samples: int) -> tuple[float, int, int]:
        """See :meth:`WorkPool.evaluate`."""
        return added(self._one.evaluate(mask_key, key, 0, batches_of(n_samples)))

    def usage(self) -> Usage:
        """See :meth:`WorkPool.usage`."""
        return dataclasses.replace(self._one.usage(), cpu_s=0.0, peak_rss_mib=0.0)  # this process counts itself

    def close(self) -> None:
        """See :meth:`WorkPool.close`."""
        if self._executor is not None:
            self._executor.close()
            self._executor = None


def added(parts: list[tuple[float, int, int]]) -> tuple[float, int, int]:
    """Sums over batches, in their order, so that rounding does not depend on who computed which."""
    loss_sum, correct, count = 0.0, 0, 0
    for loss, hits, samples in parts:
        loss_sum, correct, count = loss_sum + loss, correct + hits, count + samples
    return loss_sum, correct, count

"""Hostile devices of a simulation: what they report in place of what they measured.

They sit where the outcomes of the virtual devices come from, so that the code of a run knows nothing of them. They know
what every honest device measured in the round, as the strongest of the published attacks assume, and they collude.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ..protocol.device_side.device_events import Task
from ..protocol.perturbation.quantiles import gaussian_table
from ..protocol.perturbation.streams import Purpose, uint64s
from ..protocol.wire.messages import ReportKind
from ..simulation.pools import InlinePool
from ..simulation.work import Job, WorkResult

__all__ = ["ATTACKS", "COLLUDING", "HostilePool"]

Rows = NDArray[np.float64]
Attack = Callable[[Rows, Rows, Rows], Rows]
"""``(honest float64[n, d], what the hostile ones measured float64[m, d], chance) -> float64[m, d]``; ``chance`` are
numbers between 0 and 1, ``float64[m, d]``."""

FLIP = 4.0
NOISE = 30.0
STRETCH = 2.0
REVERSED = 0.5


def sign_flip(_honest: Rows, own: Rows, _chance: Rows) -> Rows:
    """The opposite, four times as large."""
    return -FLIP * own


def large_noise(honest: Rows, _own: Rows, chance: Rows) -> Rows:
    """Gaussian noise 30 times as large as what the honest report; Blanchard et al., arXiv 1703.02757, section 5."""
    size = NOISE * float(np.sqrt(np.mean(honest**2)))
    normal: Rows = gaussian_table().astype(np.float64)[(chance * 65_536).astype(np.int64)]
    noise: Rows = size * normal
    return noise


def trim_attack(honest: Rows, _own: Rows, chance: Rows) -> Rows:
    """Just beyond the honest values, on the side that the mean points away from; Fang et al., arXiv 1911.11815."""
    low, high, up = honest.min(axis=0), honest.max(axis=0), honest.mean(axis=0) > 0
    below = np.where(low > 0, low / STRETCH, low * STRETCH)
    above = np.where(high > 0, high * STRETCH, high / STRETCH)
    made: Rows = np.where(up, low + chance * (below - low), high + chance * (above - high))
    return made


def a_little(honest: Rows, own: Rows, _chance: Rows) -> Rows:
    """As far from the mean as some honest ones are, against its sign; Baruch et al., arXiv 1902.06156."""
    total, hostile = len(honest) + len(own), len(own)
    needed = total // 2 + 1 - hostile
    reach = NormalDist().inv_cdf(max(0.5, (total - hostile - needed) / (total - hostile)))
    mean = honest.mean(axis=0)
    return np.repeat((mean - reach * np.sign(mean) * honest.std(axis=0))[np.newaxis], hostile, axis=0)


def inner_product(honest: Rows, own: Rows, _chance: Rows) -> Rows:
    """The opposite of the honest mean, half as large; Xie et al., arXiv 1903.03936."""
    return np.repeat(-REVERSED * honest.mean(axis=0)[np.newaxis], len(own), axis=0)


ATTACKS: dict[str, Attack] = {
    "sign flip": sign_flip,
    "large noise": large_noise,
    "trim attack": trim_attack,
    "a little is enough": a_little,
    "inner product": inner_product,
}
COLLUDING = ("trim attack", "a little is enough", "inner product")
"""Those that aim at single scalars of the others: of dealt directions nobody else has the same."""


class HostilePool(InlinePool):
    """Computes as usual, then lets some devices lie about their scalars in training.

    Args:
        attack: How; None for an honest world.
        hostile: Numbers of the devices that lie.
        seed: Of their random numbers.
    """

    def __init__(self, attack: Attack | None, hostile: Collection[int], seed: int) -> None:
        super().__init__()
        self._attack, self._hostile, self._seed = attack, frozenset(hostile), seed
        self._given: list[tuple[int, Task]] = []

    def start(self, job: Job) -> None:
        """See :meth:`.pools.WorkPool.start`."""
        super().start(job)
        self._given = []

    def submit(self, ticket: int, device: int, task: Task, mask_key: str, key: bytes, micro_batch: int) -> None:
        """See :meth:`.pools.WorkPool.submit`."""
        self._given.append((device, task))
        super().submit(ticket, device, task, mask_key, key, micro_batch)

    def collect(self) -> list[WorkResult]:
        """See :meth:`.pools.WorkPool.collect`; what one round gave is there at once."""
        results, given, self._given = super().collect(), self._given, []
        if self._attack is None:
            return results
        rounds: dict[int, list[int]] = {}
        for place, ((_, task), result) in enumerate(zip(given, results, strict=True)):
            if task.kind is ReportKind.PROBE and result.outcome.blocks:
                rounds.setdefault(task.round, []).append(place)
        for round_, places in rounds.items():
            liars = [place for place in places if given[place][0] in self._hostile]
            honest = [place for place in places if given[place][0] not in self._hostile]
            if liars and honest:
                known, own = (np.array([_row(results[place]) for place in some]) for some in (honest, liars))
                words = uint64s(self._seed, Purpose.CHANCE, round_, 0, own.size).reshape(own.shape)
                made = self._attack(known, own, (words >> np.uint64(11)).astype(np.float64) * 2.0**-53)
                for place, row in zip(liars, made, strict=True):
                    results[place] = _with_row(results[place], row)
        return results


def _row(result: WorkResult) -> Rows:
    """All blocks of a report one behind the other: ``float64[d]``."""
    return np.concatenate(result.outcome.blocks).astype(np.float64)


def _with_row(result: WorkResult, row: Rows) -> WorkResult:
    ends = np.cumsum([block.size for block in result.outcome.blocks])[:-1]
    blocks = tuple(np.ascontiguousarray(part, dtype=np.float32) for part in np.split(row, ends))
    return dataclasses.replace(result, outcome=dataclasses.replace(result.outcome, blocks=blocks))

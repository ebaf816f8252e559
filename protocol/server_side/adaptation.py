"""Directions and sigma of the next round from the reports of the rounds before.

Only the server decides; the announcement says it, so nothing here has to agree between machines. What is known is a
function of the journal: a restarted server reads the same rounds in the same order and announces the same numbers.

**Directions.** A scalar is ``<g + e, d>`` with ``g`` what all devices have in common and ``e`` what one batch adds.
Only the share ``q = |g|^2 / (|g|^2 + |e|^2)`` of a scalar's square is signal, and ``n`` directions of ``q`` move the
weights along ``g`` as well as ``n q`` directions without noise would. So the next round gets ``k / q`` of them, at
most ``k_max``. The share is what two independent halves of the estimate agree on:

- ``shared`` directions: the products of the scalars of two halves of the devices. Where a robust rule or clipping says
  that some may lie, of every device's scalars with the medians of the others', and of that the median over the devices:
  a minority moves it no further than the honest devices spread;
- ``dealt`` directions, which are orthogonal within a round: the inner product of the decoded estimate of a round with
  the average of those before it. Chance alone gives about ``sqrt(d / 20) / n`` for ``d`` weights and ``n`` directions,
  so small fleets with large models learn it slowly.

This is a norm test (Byrd, Chin, Nocedal and Wu, Math. Program. 134, 2012; Bollapragada, Byrd and Nocedal, "Adaptive
sampling strategies for stochastic optimization", SIAM J. Optim. 28, 2018) with the variance taken from halves, for
directions in place of samples.

**Sigma.** The root mean square of a device's loss differences relative to its loss, ``sigma rms(s) / L``, shall be
:data:`TARGET`: about 1,700 times the rounding unit of float32, and small enough that a network with rectifiers is
nearly linear. Outside a factor of 3 around that, sigma is scaled. One-sided scalars show curvature as a mean that they
have in common (``sigma / 2`` times the trace of the Hessian): if it is more than half of their spread, sigma falls.
Source for the balance of rounding and curvature: More and Wild, "Estimating derivatives of noisy simulations", ACM
Trans. Math. Softw. 38 (2012).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..perturbation.blocks import Deal
from ..perturbation.directions import MAX_POSITION
from ..replay.update import Replica
from ..settings import TrainingSettings
from ..wire.documents import Announcement
from ..wire.messages import Report, UpdateRecord

__all__ = ["TARGET", "Adaptation", "next_sigma"]

TARGET: Final = 1e-4
MEMORY: Final = 0.9
"""How much of what earlier rounds agreed on counts in the next one."""

TOLERANCE: Final = 3.0
LARGEST_STEP: Final = 10.0
LEAST_SIGMA, MOST_SIGMA = 1e-7, 1.0
CURVED: Final = 0.5
ROUNDED: Final = 100 * 2.0**-24
"""Relative differences below are leaning, too: all of them have the rounding of one clean loss in common."""

LEAST_SCALARS: Final = 16
"""Scalars from which on their mean says something about curvature."""

_Rows = NDArray[np.float64]


class Adaptation:
    """What the next round is announced with.

    Args:
        training: Whether ``k`` and sigma are adapted at all, and from where.
        is_robust: Whether devices may lie.

    Attributes:
        k: Directions per device of the first block; 0 for the settings' number.
        sigma: Length scale, a float32 value; 0 for the settings'.
    """

    def __init__(self, training: TrainingSettings, *, is_robust: bool = False) -> None:
        self._training, self._is_robust = training, is_robust
        self.k, self.sigma = 0, 0.0
        self._agreed = self._energy = 0.0
        self._before: NDArray[np.float64] | None = None

    def learn(
        self,
        head: Announcement,
        deals: Sequence[Deal],
        reports: Sequence[tuple[int, Report]],
        record: UpdateRecord,
        replica: Replica,
    ) -> None:
        """Take a round that made an update.

        Args:
            head: Its announcement.
            deals: What it handed out.
            reports: ``(rank, report)`` of every usable report.
            record: The update.
            replica: Decodes it.
        """
        probed = [deal for deal in deals if deal.block.kind == "probe"]
        if not probed:
            return
        if self._training.adapt_sigma:
            sigma, answers = head.sigma or self._training.sigma, [report for _, report in reports]
            self.sigma = next_sigma(sigma, probed, answers, two_sided=self._training.two_sided)
        if self._training.k_max:
            self._learn_share(probed, reports, record, replica)

    def state(self) -> dict[str, float]:
        """What a snapshot says of it, as JSON types."""
        return {"k": self.k, "sigma": self.sigma, "agreed": self._agreed, "energy": self._energy}

    def state_arrays(self) -> bytes:
        """And the rest: ``float64[n_survivors]``, little-endian; empty where there is nothing."""
        return b"" if self._before is None else self._before.astype("<f8", copy=False).tobytes()

    def restore(self, state: Mapping[str, float], arrays: bytes) -> None:
        """Go to the state of :meth:`state` and :meth:`state_arrays`.

        Raises:
            KeyError, TypeError, ValueError: They are nothing of the kind.
        """
        self.k, self.sigma = int(state["k"]), float(state["sigma"])
        self._agreed, self._energy = float(state["agreed"]), float(state["energy"])
        self._before = np.frombuffer(arrays, dtype="<f8").astype(np.float64) if arrays else None

    def _learn_share(
        self, deals: Sequence[Deal], reports: Sequence[tuple[int, Report]], record: UpdateRecord, replica: Replica
    ) -> None:
        if deals[0].n_slots == 1 and len(reports) > 1:
            answers = [report for _, report in sorted(reports, key=lambda r: r[0])]
            compare = _devices_with_the_others if self._is_robust else _halves_of_devices
            agreed, energy = compare(deals, answers)
        else:
            found = replica.gradient(record).astype(np.float64)
            agreed, energy = _successive_rounds(deals, found, self._before, record)
            self._before = found if self._before is None else MEMORY * self._before + (1.0 - MEMORY) * found
            if not energy:
                return
        self._agreed = MEMORY * self._agreed + agreed
        self._energy = MEMORY * self._energy + energy
        if self._energy > 0:
            least, most = self._training.k, self._training.k_max
            share = min(1.0, max(least / most, self._agreed / self._energy))
            self.k = min(most, round(least / share))


def _halves_of_devices(deals: Sequence[Deal], reports: Sequence[Report]) -> tuple[float, float]:
    """What both halves of the devices found, and the mean square of the average over all, per direction."""
    agreed = noise = 0.0
    for deal in deals:
        rows = np.array([report.blocks[deal.block.number] for report in reports], dtype=np.float64)
        common = float(np.mean(rows[0::2].mean(axis=0) * rows[1::2].mean(axis=0)))
        agreed += common
        noise += max(0.0, float(np.mean(rows**2)) - common) / len(rows)
    return agreed, max(0.0, agreed) + noise


def _devices_with_the_others(deals: Sequence[Deal], reports: Sequence[Report]) -> tuple[float, float]:
    """As :func:`_halves_of_devices`, with medians in place of means; more than half of the devices must be honest."""
    agreed, squares = np.zeros(len(reports)), np.zeros(len(reports))
    for deal in deals:
        rows = np.array([report.blocks[deal.block.number] for report in reports], dtype=np.float64)
        agreed += np.mean(rows * _medians_of_the_others(rows), axis=1)
        squares += np.mean(rows**2, axis=1)
    common = float(np.median(agreed))
    return common, max(0.0, common) + max(0.0, float(np.median(squares)) - common) / len(reports)


def _medians_of_the_others(rows: _Rows) -> _Rows:
    """For every scalar of every row the median over all rows but its own, ``float64[n, size]``; ``n`` of 2 or more."""
    ordered = np.sort(rows, axis=0)
    ranks = np.argsort(np.argsort(rows, axis=0, kind="stable"), axis=0, kind="stable")

    def without_own(place: int) -> _Rows:
        found: _Rows = np.where(place < ranks, ordered[place], ordered[place + 1])
        return found

    return (without_own((len(rows) - 2) // 2) + without_own((len(rows) - 1) // 2)) / 2.0


def _successive_rounds(
    deals: Sequence[Deal], found: NDArray[np.float64], before: NDArray[np.float64] | None, record: UpdateRecord
) -> tuple[float, float]:
    """What a round and those before it found, and the mean square of its scalars, per direction; zeros at first."""
    agreed = energy = 0.0
    if before is None:
        return agreed, energy
    owners = record.positions() // MAX_POSITION
    for deal in deals:
        block = deal.block
        part = slice(block.first, block.first + block.size)
        agreed += float(np.sum(found[part] * before[part]))
        coefficients = record.coefficients[owners == block.number].astype(np.float64)
        energy += coefficients.size * float(np.sum(coefficients**2))
    return agreed, energy


def next_sigma(sigma: float, deals: Sequence[Deal], reports: Sequence[Report], *, two_sided: bool) -> float:
    """Sigma of the next round; medians over the devices, so that a few strange ones do not count.

    Args:
        sigma: Of this round.
        deals: Of the probed blocks.
        reports: Usable ones.
        two_sided: Kind of difference.

    Returns:
        A float32 value.
    """
    rows = [[report.blocks[deal.block.number].astype(np.float64) for deal in deals] for report in reports]
    changes = [
        sigma * max(float(np.sqrt(np.mean(block**2))) for block in row) / report.mean_loss
        for row, report in zip(rows, reports, strict=True)
        if report.mean_loss > 0
    ]
    if not changes:
        return sigma
    change = float(np.median(changes))
    factor = min(LARGEST_STEP, TARGET / change) if change > TARGET / LARGEST_STEP else LARGEST_STEP
    factor = max(1.0 / LARGEST_STEP, factor)
    if not two_sided and change > ROUNDED and _is_curved(deals, rows):
        factor = min(factor, 1.0 / TOLERANCE)
    elif 1.0 / TOLERANCE <= factor <= TOLERANCE:
        return sigma
    return float(np.float32(min(MOST_SIGMA, max(LEAST_SIGMA, sigma * factor))))


def _is_curved(deals: Sequence[Deal], rows: Sequence[Sequence[NDArray[np.float64]]]) -> bool:
    """Whether the one-sided scalars of a block, over all devices, lie more on one side than directions explain."""
    for number, deal in enumerate(deals):
        blocks = [row[number] for row in rows]
        if (1 if deal.n_slots == 1 else len(blocks)) * deal.k < LEAST_SCALARS:
            continue
        mean, spread = np.median([block.mean() for block in blocks]), np.median([block.std() for block in blocks])
        if abs(float(mean)) > CURVED * float(spread):
            return True
    return False

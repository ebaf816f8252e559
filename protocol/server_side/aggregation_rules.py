"""How the reports of a round become one row of scalars when some devices may be hostile.

Each rule takes one row a device, ``float64[n_devices, n]``, and gives one row. Rules that compare devices need rows
that say the same thing: shared directions, coordinates of a sketch, scores. Of dealt directions every device has its
own, so that only the mean is possible, with clipping. All rules but the mean give a device one vote, whatever number of
samples it says that it has: a hostile one would claim the most.

Sources: median and trimmed mean: Yin et al., arXiv 1803.01498. Krum and multi-Krum: Blanchard et al., arXiv 1703.02757.
Sign vote: Bernstein et al., arXiv 1810.05291. Centred clipping: Karimireddy, He and Jaggi, arXiv 2012.10333, here from
the median in place of the last round's result, so that a round depends on nothing but its reports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, QuorumError

__all__ = ["RULES", "AggregationSettings", "Clip", "Rule", "RuleName", "aggregate", "clip_rows"]

RuleName = Literal["mean", "median", "trimmed-mean", "krum", "multi-krum", "sign-vote", "centred-clip"]
Clip = Literal["none", "norm", "value"]
Rows = NDArray[np.float64]
CENTRINGS = 3
"""Steps of centred clipping; the paper finds that few are enough."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to make one row of many.

    Attributes:
        combine: ``(rows float64[n_devices, n], weights float64[n_devices], hostile) -> float64[n]``; rows are in the
            order of ranks, so that sums do not depend on the order of arrival. It owns nothing of what it gets.
        spare: Reports that it needs beside two for each hostile device.
        compares: Whether rows must say the same thing.
        is_told: Whether it must know how many hostile devices there may be.
    """

    combine: Callable[[Rows, Rows, int], Rows]
    spare: int = 1
    compares: bool = True
    is_told: bool = False


@dataclass(frozen=True, slots=True)
class AggregationSettings:
    """What the server makes of the scalars of a round.

    Attributes:
        rule: ``mean``, weighted by samples; ``median`` and ``trimmed-mean`` of every scalar; ``krum``: the report that
            is closest to the others; ``multi-krum``: the mean of those that are; ``sign-vote``: the sign of the
            majority and the median size of every scalar; ``centred-clip``: the mean of what lies near the median.
        hostile: Reports of a round that may come from hostile devices; ``trimmed-mean``, ``krum`` and ``multi-krum``
            need to know it. The quorum must be large enough that the others outvote them.
        clip: ``norm``: scale rows down whose root mean square is over the limit, ``value``: cut scalars off that are,
            before the rule sees them; ``none``.
        clip_factor: The limit relative to the median of the devices' root mean squares.
    """

    rule: RuleName = "mean"
    hostile: int = 0
    clip: Clip = "none"
    clip_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ConfigError(f"the rule is {self.rule!r}", hint=f"use one of {', '.join(RULES)}")
        if self.clip not in get_args(Clip):
            raise ConfigError(f"the clipping is {self.clip!r}", hint=f"use one of {', '.join(get_args(Clip))}")
        if not 0 <= self.hostile <= 50_000:
            what = f"the number of hostile devices is {self.hostile}, it must be 0 to 50000"
            raise ConfigError(what, setting="hostile")
        if not 0.01 <= self.clip_factor <= 1e6:
            what = f"the clip factor is {self.clip_factor}, it must be 0.01 to 1e6"
            raise ConfigError(what, setting="clip_factor")
        if self.hostile and self.rule == "mean":
            raise ConfigError(
                f"the rule mean counts everybody, also the {self.hostile} hostile devices",
                hint="use another --rule, such as trimmed-mean",
            )
        if not self.hostile and RULES[self.rule].is_told:
            raise ConfigError(
                f"the rule {self.rule} must know how many devices may be hostile", hint="give --hostile 1 or more"
            )

    @property
    def compares(self) -> bool:
        """Whether the rule needs devices that measured the same thing."""
        return RULES[self.rule].compares

    @property
    def least_reports(self) -> int:
        """Reports that the rule needs for what it promises."""
        return 2 * self.hostile + RULES[self.rule].spare if self.hostile else 1

    @property
    def is_plain(self) -> bool:
        """Whether it is the weighted mean and nothing else."""
        return self.rule == "mean" and self.clip == "none"


def aggregate(settings: AggregationSettings, rows: Rows, weights: Rows) -> Rows:
    """One row out of many: what is clipped is clipped, then the rule decides.

    Args:
        settings: The rule.
        rows: ``float64[n_devices, n]``, finite, in the order of ranks; not changed.
        weights: ``float64[n_devices]``, above 0; only the mean looks at them.

    Returns:
        ``float64[n]``, owned by the caller, finite.

    Raises:
        QuorumError: There are fewer rows than the rule needs.
    """
    if len(rows) < settings.least_reports:
        raise QuorumError(
            f"{len(rows)} reports, the rule {settings.rule} needs {settings.least_reports}", hint="raise the quorum"
        )
    return RULES[settings.rule].combine(clip_rows(settings, rows), weights, settings.hostile)


def clip_rows(settings: AggregationSettings, rows: Rows) -> Rows:
    """Rows with the scalars that are too large made smaller.

    The limit follows the devices, not the clock: scalars shrink during training. It is the median over the devices, so
    less than half of them cannot raise it above the largest root mean square of the others.

    Args:
        settings: The clipping.
        rows: ``float64[n_devices, n]``; not changed.

    Returns:
        ``float64[n_devices, n]``; the rows themselves if nothing is clipped.
    """
    if settings.clip == "none" or not rows.size:
        return rows
    sizes = np.sqrt(np.mean(rows**2, axis=1))
    limit = settings.clip_factor * float(np.median(sizes))
    if settings.clip == "value":
        return np.clip(rows, -limit, limit)
    return rows * _shrink(sizes, limit)[:, np.newaxis]


def _shrink(sizes: Rows, limit: float) -> Rows:
    """What brings each size to the limit, at most 1: ``float64[n]``."""
    factors = np.ones_like(sizes)
    np.divide(limit, sizes, out=factors, where=sizes > limit)
    return factors


def _mean(rows: Rows, weights: Rows, _hostile: int = 0) -> Rows:
    total = np.zeros(rows.shape[1])
    for weight, row in zip(weights.tolist(), rows, strict=True):
        total += weight * row
    return total / float(sum(weights.tolist()))


def _median(rows: Rows, _weights: Rows, _hostile: int) -> Rows:
    return np.asarray(np.median(rows, axis=0), dtype=np.float64)


def _trimmed_mean(rows: Rows, _weights: Rows, hostile: int) -> Rows:
    """The mean of each scalar without its ``hostile`` smallest and largest values."""
    kept = np.sort(rows, axis=0)[hostile : len(rows) - hostile]
    return _mean(kept, np.ones(len(kept)))


def _krum_scores(rows: Rows, hostile: int) -> Rows:
    """Of every row the sum of its squared distances to the nearest ``n - hostile - 2`` others: ``float64[n]``.

    By differences, not by products: exact where rows are alike, and the same bits whatever computes products. It takes
    time with the square of the number of rows.
    """
    nearest = max(1, len(rows) - hostile - 2)
    scores, difference = np.empty(len(rows)), np.empty_like(rows)
    for i, row in enumerate(rows):
        np.subtract(rows, row, out=difference)
        np.multiply(difference, difference, out=difference)
        distances = np.sort(np.delete(difference.sum(axis=1), i))
        scores[i] = distances[:nearest].sum()
    return scores


def _krum(rows: Rows, _weights: Rows, hostile: int) -> Rows:
    """The row with the smallest score; of equal ones the first."""
    best: Rows = rows[int(np.argmin(_krum_scores(rows, hostile)))]
    return best.copy()


def _multi_krum(rows: Rows, _weights: Rows, hostile: int) -> Rows:
    """The mean of as many best rows as a score has neighbours."""
    order = np.argsort(_krum_scores(rows, hostile), kind="stable")[: max(1, len(rows) - hostile - 2)]
    best = rows[np.sort(order)]
    return _mean(best, np.ones(len(best)))


def _sign_vote(rows: Rows, weights: Rows, hostile: int) -> Rows:
    """A tie is 0. The size is a median too: a constant one would lose which directions matter."""
    signs: Rows = np.sign(np.sign(rows).sum(axis=0))
    return signs * _median(np.abs(rows), weights, hostile)


def _centred_clip(rows: Rows, weights: Rows, hostile: int) -> Rows:
    """Steps from the median to the mean of rows that are cut off at the median distance."""
    centre = _median(rows, weights, hostile)
    radius: float | None = None
    for _ in range(CENTRINGS):
        away = rows - centre
        distances = np.sqrt(np.sum(away**2, axis=1))
        radius = float(np.median(distances)) if radius is None else radius
        centre = centre + _mean(away * _shrink(distances, radius)[:, np.newaxis], np.ones(len(rows)))
    return centre


RULES: dict[RuleName, Rule] = {
    "mean": Rule(_mean, compares=False),
    "median": Rule(_median),
    "trimmed-mean": Rule(_trimmed_mean, is_told=True),
    "krum": Rule(_krum, spare=3, is_told=True),
    "multi-krum": Rule(_multi_krum, spare=3, is_told=True),
    "sign-vote": Rule(_sign_vote),
    "centred-clip": Rule(_centred_clip),
}

"""From the reports of one round to what the round decides: an update, a mask, an evaluation.

Only the coordinator computes this, in float64; what it sends is exact float32, so that nobody has to agree on sums.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import Manifest
from ..errors import ProtocolError
from ..perturbation.blocks import Block, Deal
from ..perturbation.directions import round_coefficients
from ..settings import RunSettings
from ..wire.messages import Report, ReportKind
from ..wire.scalar_rows import round_to_halves
from .aggregation_rules import AggregationSettings, aggregate, clip_rows

__all__ = [
    "MAX_PARTICIPANTS",
    "Evaluation",
    "average_blocks",
    "block_estimates",
    "check_report",
    "combine_probes",
    "combine_scores",
    "evaluate_reports",
    "round_block",
]

MAX_PARTICIPANTS = 24_000  # with every second one missing, segments and scalars still fit one update
MAX_EVALUATED = float(1 << 32)
_PLAIN = AggregationSettings()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A sum of evaluations.

    Attributes:
        mean_loss: Mean cross-entropy over all samples.
        accuracy: Fraction correct.
        samples: Number of samples.
    """

    mean_loss: float
    accuracy: float
    samples: int


def check_report(
    report: Report,
    kind: ReportKind,
    manifest: Manifest,
    settings: RunSettings,
    deals: Sequence[Deal],
    weights_digest: bytes,
    rank: int = 0,
) -> None:
    """Treat every scalar as hostile: right kind, right counts, bounded, made with the right weights.

    Raises:
        ProtocolError: The report cannot count; the text says why.
    """
    if report.kind is not kind:
        raise ProtocolError(f"a {report.kind.name.lower()} report in a {kind.name.lower()} round")
    if not report.blocks:
        return
    if report.weights_digest != weights_digest:
        raise ProtocolError("made with other weights")
    counts = tuple(block.size for block in report.blocks)
    if kind is ReportKind.PROBE:
        wanted: tuple[int, ...] = tuple(deal.size(deal.slot(rank)) for deal in deals)
    elif kind is ReportKind.SALIENCY:
        layers = (len(manifest.units),) if settings.saliency.draws else ()
        wanted = (manifest.n_units, manifest.n_moments, *layers)
    else:
        wanted = (3,)
    if counts != wanted:
        raise ProtocolError(f"blocks of {counts} scalars instead of {wanted}")
    if not 1 <= report.samples <= _most_samples(kind, settings):
        most = _most_samples(kind, settings)
        raise ProtocolError(f"{report.samples} samples behind the scalars, the settings allow 1 to {most}")
    largest = max(float(np.abs(block).max(initial=0.0)) for block in report.blocks)
    smallest = min(float(block.min(initial=0.0)) for block in report.blocks)
    if largest > settings.scalar_limit and kind is not ReportKind.EVALUATE:
        raise ProtocolError(f"a scalar of {largest:.3g} is over the limit of {settings.scalar_limit:.3g}")
    if kind is not ReportKind.PROBE and smallest < 0:
        raise ProtocolError(f"a {kind.name.lower()} scalar is negative")
    if kind is ReportKind.EVALUATE:
        _, correct, samples = (float(value) for value in report.blocks[0])
        if correct > samples or not 1.0 <= samples <= MAX_EVALUATED:
            raise ProtocolError(f"{correct:g} correct answers of {samples:g} samples")


def _most_samples(kind: ReportKind, settings: RunSettings) -> int:
    """A report weighs as much as its samples, so it cannot claim more than it was asked to take."""
    if kind is ReportKind.PROBE:
        return settings.training.batch
    return settings.saliency.samples if kind is ReportKind.SALIENCY else int(MAX_EVALUATED)


def combine_probes(
    deals: Sequence[Deal], reports: Sequence[tuple[int, Report]], rule: AggregationSettings = _PLAIN
) -> tuple[tuple[tuple[int, int], ...], NDArray[np.float32]]:
    """Segments and coefficients of an update.

    The estimate of a probed block is the mean of scalar times direction over the positions that were answered; a sketch
    has coefficients already. Where all devices have the same positions, the rule makes one row of scalars of all.

    Args:
        deals: What the round handed out, one per block.
        reports: ``(rank, report)`` of every usable report, in any order; one block of scalars per deal.
        rule: How. Of dealt directions only its clipping counts.

    Returns:
        Segments ``(first position, count)``, ascending, adjacent ones joined, and ``float32[sum of counts]``.

    Raises:
        QuorumError: There are fewer reports than the rule needs.
    """
    found = block_estimates(deals, reports, rule)
    segments = tuple(place for places, _ in found for place in places)
    return segments, np.concatenate([round_block(d.block, part) for d, (_, part) in zip(deals, found, strict=True)])


def block_estimates(
    deals: Sequence[Deal], reports: Sequence[tuple[int, Report]], rule: AggregationSettings
) -> list[tuple[list[tuple[int, int]], NDArray[np.float64]]]:
    """Segments and coefficients of every block, not rounded yet; see :func:`combine_probes`."""
    found: list[tuple[list[tuple[int, int]], NDArray[np.float64]]] = []
    ordered = sorted(reports, key=lambda item: item[0])
    shared = _combine_shared(deals, [report for _, report in ordered], rule)
    for number, deal in enumerate(deals):
        first = deal.block.offset + deal.first
        if deal.n_slots == 1:
            mean = shared[number] / deal.k if deal.block.kind == "probe" else shared[number]
            found.append(([(first, deal.k)], mean))
            continue
        rows = [report.blocks[number].astype(np.float64) for _, report in ordered]
        if rule.clip != "none":
            rows = list(clip_rows(rule, np.array(rows)))
        dealt = sorted(zip((deal.slot(rank) for rank, _ in ordered), rows, strict=True), key=lambda item: item[0])
        segments: list[tuple[int, int]] = []
        for slot, _ in dealt:
            start, size = deal.block.offset + deal.start(slot), deal.size(slot)
            if segments and sum(segments[-1]) == start:
                segments[-1] = (segments[-1][0], segments[-1][1] + size)
            else:
                segments.append((start, size))
        total = sum(deal.size(slot) for slot, _ in dealt)
        found.append((segments, np.concatenate([row / total for _, row in dealt])))
    return found


def round_block(block: Block, values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Coefficients of a block as they travel: those of a sketch also fit a row of halves."""
    rounded = round_coefficients(values)
    return round_coefficients(round_to_halves(rounded).astype(np.float64)) if block.kind == "sketch" else rounded


def _combine_shared(
    deals: Sequence[Deal], reports: Sequence[Report], rule: AggregationSettings
) -> dict[int, NDArray[np.float64]]:
    """One row for every block whose positions all devices have: ``float64[k]`` by the number of the block.

    The rule sees the blocks of a device as one row, each in units of the gradient that it stands for: a direction of
    ``d`` weights has the squared length ``d``. These units are powers of two, so that nothing is rounded.
    """
    numbers = [number for number, deal in enumerate(deals) if deal.n_slots == 1]
    lengths = {
        number: max(1, deal.block.size) ** 0.5 / deal.k if deal.block.kind == "probe" else 1.0
        for number, deal in enumerate(deals)
    }
    return dict(zip(numbers, _combine(reports, numbers, [lengths[n] for n in numbers], rule), strict=True))


def _combine(
    reports: Sequence[Report], numbers: Sequence[int], lengths: Sequence[float], rule: AggregationSettings
) -> list[NDArray[np.float64]]:
    """What the rule makes of some blocks of the reports; ``lengths`` is what a scalar of each block is worth."""
    if rule.is_plain or not numbers:  # without one large array of all scalars
        return [_weighted_mean([(report.samples, report.blocks[number]) for report in reports]) for number in numbers]
    units = [2.0 ** round(math.log2(length)) for length in lengths]
    rows = np.array(
        [
            np.concatenate([unit * report.blocks[n].astype(np.float64) for n, unit in zip(numbers, units, strict=True)])
            for report in reports
        ]
    )
    found = aggregate(rule, rows, np.array([report.samples for report in reports], dtype=np.float64))
    ends = np.cumsum([reports[0].blocks[number].size for number in numbers])[:-1]
    return [part / unit for part, unit in zip(np.split(found, ends), units, strict=True)]


def _weighted_mean(rows: Sequence[tuple[int, NDArray[np.float32]]]) -> NDArray[np.float64]:
    total = np.zeros(rows[0][1].size, dtype=np.float64)
    for weight, row in rows:
        total += float(weight) * row.astype(np.float64)
    return total / float(sum(weight for weight, _ in rows))


def average_blocks(reports: Sequence[Report]) -> tuple[NDArray[np.float64], ...]:
    """Mean of every block over the reports, weighted by samples: ``float64[n]`` per block."""
    return combine_scores(reports, _PLAIN)


def combine_scores(reports: Sequence[Report], rule: AggregationSettings) -> tuple[NDArray[np.float64], ...]:
    """What the rule makes of the scores of a round: ``float64[n]`` per block.

    Scores have no sign, so ``sign-vote`` takes their median. Blocks weigh alike where devices are compared as a whole.

    Args:
        reports: In the order of ranks, all with the same blocks.
        rule: How.

    Raises:
        QuorumError: There are fewer reports than the rule needs.
    """
    if rule.rule == "sign-vote":
        rule = dataclasses.replace(rule, rule="median")
    numbers = range(len(reports[0].blocks))
    lengths = []
    for number in numbers:
        sizes = [float(np.linalg.norm(report.blocks[number].astype(np.float64))) for report in reports]
        lengths.append(1.0 / (float(np.median(sizes)) or 1.0))
    return tuple(_combine(reports, numbers, lengths, rule))


def evaluate_reports(reports: Sequence[Report]) -> Evaluation | None:
    """Sum of the devices' evaluations; None if no device has held-out samples."""
    rows = [report.blocks[0].astype(np.float64) for report in reports]
    samples = sum(int(row[2]) for row in rows)
    if samples == 0:
        return None
    loss = float(sum(float(row[0]) for row in rows)) / samples
    return Evaluation(loss, float(sum(float(row[1]) for row in rows)) / samples, samples)

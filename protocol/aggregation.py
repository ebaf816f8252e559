"""From the reports of one round to what the round decides: an update, a mask, an evaluation.

Only the coordinator computes this, in float64; what it sends is exact float32, so that nobody has to agree on sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .blocks import Deal
from .directions import round_coefficients
from .errors import ProtocolError
from .manifest import Manifest
from .messages import Report, ReportKind
from .scalar_rows import round_to_halves
from .settings import RunSettings

__all__ = [
    "MAX_PARTICIPANTS",
    "Evaluation",
    "average_blocks",
    "check_report",
    "combine_probes",
    "evaluate_reports",
]

MAX_PARTICIPANTS = 24_000  # with every second one missing, segments and scalars still fit one update
MAX_EVALUATED = float(1 << 32)


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
        wanted: tuple[int, ...] = tuple(deal.k for deal in deals)
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
    deals: Sequence[Deal], reports: Sequence[tuple[int, Report]]
) -> tuple[tuple[tuple[int, int], ...], NDArray[np.float32]]:
    """Segments and coefficients of an update.

    The estimate of a probed block is the mean of scalar times direction over the positions that were answered; a sketch
    has coefficients already, which are averaged. Averages over devices are weighted by samples.

    Args:
        deals: What the round handed out, one per block.
        reports: ``(rank, report)`` of every usable report, in any order; one block of scalars per deal.

    Returns:
        Segments ``(first position, count)``, ascending, adjacent ones joined, and ``float32[sum of counts]``.
    """
    segments: list[tuple[int, int]] = []
    parts: list[NDArray[np.float64]] = []
    for number, deal in enumerate(deals):
        first = deal.block.offset + deal.first
        if deal.n_slots == 1:
            scale = 1.0 / deal.k if deal.block.kind == "probe" else 1.0
            ordered = sorted(reports, key=lambda item: item[0])
            mean = _weighted_mean([(report.samples, report.blocks[number]) for _, report in ordered]) * scale
            if deal.block.kind == "sketch":
                mean = round_to_halves(round_coefficients(mean)).astype(np.float64)
            parts.append(mean)
            segments.append((first, deal.k))
            continue
        dealt = sorted(((deal.slot(rank), report) for rank, report in reports), key=lambda item: item[0])
        for slot, report in dealt:
            start = first + slot * deal.k
            if segments and sum(segments[-1]) == start:
                segments[-1] = (segments[-1][0], segments[-1][1] + deal.k)
            else:
                segments.append((start, deal.k))
            parts.append(report.blocks[number].astype(np.float64) / (len(dealt) * deal.k))
    return tuple(segments), round_coefficients(np.concatenate(parts))


def _weighted_mean(rows: Sequence[tuple[int, NDArray[np.float32]]]) -> NDArray[np.float64]:
    total = np.zeros(rows[0][1].size, dtype=np.float64)
    for weight, row in rows:
        total += float(weight) * row.astype(np.float64)
    return total / float(sum(weight for weight, _ in rows))


def average_blocks(reports: Sequence[Report]) -> tuple[NDArray[np.float64], ...]:
    """Mean of every block over the reports, weighted by samples: ``float64[n]`` per block."""
    return tuple(
        _weighted_mean([(report.samples, report.blocks[i]) for report in reports])
        for i in range(len(reports[0].blocks))
    )


def evaluate_reports(reports: Sequence[Report]) -> Evaluation | None:
    """Sum of the devices' evaluations; None if no device has held-out samples."""
    rows = [report.blocks[0].astype(np.float64) for report in reports]
    samples = sum(int(row[2]) for row in rows)
    if samples == 0:
        return None
    loss = float(sum(float(row[0]) for row in rows)) / samples
    return Evaluation(loss, float(sum(float(row[1]) for row in rows)) / samples, samples)

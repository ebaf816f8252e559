"""From the reports of one round to what the round decides: an update, a mask, an evaluation.

Only the coordinator computes this, in float64; what it sends is exact float32, so that nobody has to agree on sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .directions import round_coefficients
from .errors import ProtocolError
from .manifest import Manifest
from .messages import Report, ReportKind
from .settings import Assignment, RunSettings
from .wire import MAX_SCALARS

__all__ = [
    "MAX_PARTICIPANTS",
    "Evaluation",
    "average_blocks",
    "check_report",
    "combine_probes",
    "directions_per_device",
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
    report: Report, kind: ReportKind, manifest: Manifest, settings: RunSettings, k: int, weights_digest: bytes
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
        wanted: tuple[int, ...] = (k,)
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


def directions_per_device(k: int, n_slots: int, n_positions: int) -> int:
    """How many directions a device gets, so that whoever reports, the update fits one message.

    Args:
        k: What the settings ask for.
        n_slots: Disjoint runs of positions that the round hands out, at most :data:`MAX_PARTICIPANTS`.
        n_positions: After how many positions the directions repeat.
    """
    return max(1, min(k, n_positions // n_slots, MAX_SCALARS // n_slots))


def combine_probes(
    assignment: Assignment, cursor: int, k: int, reports: Sequence[tuple[int, Report]]
) -> tuple[tuple[tuple[int, int], ...], NDArray[np.float32]]:
    """Segments and coefficients of an update.

    Args:
        assignment: ``shared`` averages the scalars of a direction, weighted by samples; ``dealt`` strings them up.
        cursor: First position of the round.
        k: Directions per device.
        reports: ``(slot, report)`` of every usable report, in any order.

    Returns:
        Segments ``(first position, count)``, ascending, adjacent ones joined, and ``float32[sum of counts]``.
    """
    ordered = sorted(reports, key=lambda item: item[0])
    if assignment == "shared":
        blocks = [report.blocks[0].astype(np.float64) for _, report in ordered]
        weights = [float(report.samples) for _, report in ordered]
        total = np.zeros(k, dtype=np.float64)
        for weight, block in zip(weights, blocks, strict=True):
            total += weight * block
        return ((cursor, k),), round_coefficients(total / sum(weights))
    segments: list[tuple[int, int]] = []
    for slot, _ in ordered:
        first = cursor + slot * k
        if segments and segments[-1][0] + segments[-1][1] == first:
            segments[-1] = (segments[-1][0], segments[-1][1] + k)
        else:
            segments.append((first, k))
    scalars = np.concatenate([report.blocks[0] for _, report in ordered]).astype(np.float64)
    return tuple(segments), round_coefficients(scalars)


def average_blocks(reports: Sequence[Report]) -> tuple[NDArray[np.float64], ...]:
    """Mean of every block over the reports, weighted by samples: ``float64[n]`` per block."""
    weights = [float(report.samples) for report in reports]
    out = []
    for i in range(len(reports[0].blocks)):
        total = np.zeros(reports[0].blocks[i].size, dtype=np.float64)
        for weight, report in zip(weights, reports, strict=True):
            total += weight * report.blocks[i]
        out.append(total / sum(weights))
    return tuple(out)


def evaluate_reports(reports: Sequence[Report]) -> Evaluation | None:
    """Sum of the devices' evaluations; None if no device has held-out samples."""
    rows = [report.blocks[0].astype(np.float64) for report in reports]
    samples = sum(int(row[2]) for row in rows)
    if samples == 0:
        return None
    loss = float(sum(float(row[0]) for row in rows)) / samples
    return Evaluation(loss, float(sum(float(row[1]) for row in rows)) / samples, samples)

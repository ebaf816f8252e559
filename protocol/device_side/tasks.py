"""From an announcement to a device's task, and from what came of it to the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ..errors import ProtocolError
from ..perturbation.dealing import deals_of
from ..replay.update import Replica
from ..wire.documents import Announcement, RunDocument
from ..wire.messages import KINDS, Decline, Report, ReportKind
from ..wire.participants import unpack_participants
from .device_events import Outcome, Task

__all__ = ["is_wanted", "make_report", "make_task"]


def make_task(
    run: RunDocument,
    head: Announcement,
    ordinal: int,
    number: int,
    replica: Replica,
    recent: Iterable[tuple[int, int]] = (),
) -> Task | None:
    """What the announced round asks of a device.

    Args:
        run: The run.
        head: The round.
        ordinal: The device's number in the run.
        number: Of the task.
        replica: At the round's weights.
        recent: Place in the log and round of its latest updates.

    Returns:
        The task, or None if the round has no work for this device.

    Raises:
        ProtocolError: The set of participants cannot be unpacked.
    """
    kind = KINDS.get(head.phase)
    if kind is None:
        return None
    members = unpack_participants(head.participants)
    rank = int(np.searchsorted(members, ordinal))
    if rank == members.size or members[rank] != ordinal:
        return None
    positions: tuple[NDArray[np.int64], ...] = ()
    if kind is ReportKind.PROBE:
        positions = tuple(
            replica.coordinates(one.block.number, one.k)
            if one.block.kind == "sketch"
            else one.positions(one.slot(rank))
            for one in deals_of(run.settings, replica.blocks, head)
        )
    weights, digest = replica.evaluated() if kind is ReportKind.EVALUATE else (replica.weights.copy(), replica.digest)
    return Task(
        number, kind, head.round, ordinal, positions, weights, digest, head.sigma, head.log_length, tuple(recent)
    )


def is_wanted(task: Task, run: RunDocument, head: Announcement) -> bool:
    """Whether the server can still use what comes of a task: its round is open, or made one of the latest updates.

    Args:
        task: Of this run.
        run: The run.
        head: The latest announcement.
    """
    if task.round >= head.round:
        return True
    if task.kind is not ReportKind.PROBE or head.log_length >= run.training.rounds:
        return False
    return 1 <= head.log_length - task.log_length <= run.settings.staleness


def make_report(run: RunDocument, task: Task, outcome: Outcome, session: int, micro_batch: int) -> Report:
    """The report of a task; scalars that could not be sent become a report that declines.

    Args:
        run: The run.
        task: What was asked.
        outcome: What came of it.
        session: Boot counter of the device.
        micro_batch: Of the device's plan.
    """
    if not np.isfinite(outcome.mean_loss) or not all(bool(np.isfinite(block).all()) for block in outcome.blocks):
        outcome = dataclasses.replace(outcome, blocks=(), mean_loss=0.0, decline=outcome.decline or Decline.NON_FINITE)
    try:
        return _report(run, task, outcome, session, micro_batch)
    except ProtocolError:
        declined = Outcome((), 0, decline=outcome.decline or Decline.FAILED)
        return _report(run, task, declined, session, micro_batch)


def _report(run: RunDocument, task: Task, outcome: Outcome, session: int, micro_batch: int) -> Report:
    return Report(
        kind=task.kind,
        run_tag=run.tag,
        round=task.round,
        session=session,
        samples=outcome.samples,
        weights_digest=task.weights_digest,
        mean_loss=outcome.mean_loss,
        queries=outcome.queries,
        elapsed_ms=outcome.elapsed_ms,
        peak_rss_kib=outcome.peak_rss_kib,
        blocks=outcome.blocks,
        decline=outcome.decline,
        micro_batch=micro_batch,
    )

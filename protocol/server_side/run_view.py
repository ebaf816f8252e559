"""What a coordinator shows of its run's progress."""

from __future__ import annotations

from ..pruning.mask import Mask
from ..replay.update import Replica
from .rate_finder import RangeTest
from .run_progress import EvaluationRecord, RunProgress

__all__ = ["RunView"]


class RunView:
    """How far a run has come, to look at.

    Args:
        progress: Of the run.
    """

    def __init__(self, progress: RunProgress) -> None:
        self._progress = progress

    @property
    def mask(self) -> Mask:
        """The survivors."""
        return self._progress.mask

    @property
    def unscored(self) -> tuple[str, ...]:
        """Weights of layers that the last scores said nothing about, see docs/pruning.md."""
        return self._progress.unscored

    @property
    def replica(self) -> Replica:
        """The weights."""
        return self._progress.replica

    @property
    def evaluations(self) -> list[EvaluationRecord]:
        """What evaluation rounds found, oldest first."""
        return self._progress.evaluations

    @property
    def range_test(self) -> RangeTest | None:
        """What a range test has found so far; None if the run is none."""
        return self._progress.range_test

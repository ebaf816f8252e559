"""How far a device's engine is prepared for a run: the memory plan, then the mask that it was opened with."""

from __future__ import annotations

from ..artifact.graph_files import GraphFile
from ..artifact.manifest import Manifest
from ..pruning.mask import Mask
from ..wire.documents import RunDocument
from .device_events import DeviceCommand, OverBudget, Plan, Planned, Prepare, Prepared

__all__ = ["Preparation"]

MAX_MICRO_BATCH = (1 << 16) - 1  # what messages can say


class Preparation:
    """The engine of one run, as the state machine knows it.

    An engine may need more memory than its plan says and than the device allows. Then :attr:`is_over_budget` stands,
    and nothing is opened or computed until the server orders a smaller micro-batch and there is a plan with that.

    Args:
        run: What it is prepared for; answers about other runs mean nothing.

    Attributes:
        peak_mib: Planned peak of the process; 0 before there is a plan.
        micro_batch: Samples of one run of a graph in the latest plan; 0 before there is one.
        files: Graphs that the plan would use besides the artifact's own.
        is_over_budget: The plan turned out to be too small.
        detail: Why.
    """

    def __init__(self, run: RunDocument) -> None:
        self._run = run
        self.peak_mib = 0.0
        self.micro_batch = 0
        self.files: tuple[GraphFile, ...] = ()
        self.is_over_budget = False
        self.detail = ""
        self._limit: int | None = None
        self._is_planned = self._is_planning = self._is_preparing = False
        self._mask_sha256: str | None = None

    # --- facts --------------------------------------------------------------------------------------------------

    def take(self, event: Planned | Prepared | OverBudget) -> None:
        """Take an answer of the shell."""
        if isinstance(event, Planned):
            self._planned(event)
        elif isinstance(event, Prepared):
            self._prepared(event)
        else:
            self.over_budget(event.run, event.detail)

    def _planned(self, event: Planned) -> None:
        """Take the answer to :class:`Plan`; one from before the latest limit means nothing."""
        if event.run != self._run.run:
            return
        self._is_planning = False
        if self._limit is None or event.micro_batch <= self._limit:
            self.peak_mib, self.files = event.peak_mib, event.files
            self.micro_batch = min(event.micro_batch, MAX_MICRO_BATCH)
            self._is_planned = True

    def _prepared(self, event: Prepared) -> None:
        """Take the answer to :class:`Prepare`; one from before the latest plan means nothing."""
        if event.run == self._run.run and self._is_planned:
            self._mask_sha256, self._is_preparing = event.mask_sha256, False

    def over_budget(self, run: str, detail: str) -> None:
        """The engine could not be opened, or not compute; if that was before the latest plan it means nothing."""
        if run == self._run.run and self._is_planned:
            self.is_over_budget, self.detail = True, detail
            self._mask_sha256, self._is_preparing = None, False

    def limit(self, micro_batch: int) -> bool:
        """The server orders a micro-batch.

        Returns:
            Whether a new plan is needed; what is computed with the old one is in vain.
        """
        if self._limit is not None and micro_batch >= self._limit:
            return False
        self._limit = micro_batch
        if not self._is_planned or self.micro_batch <= micro_batch:
            return False
        self._is_planned = self._is_preparing = self.is_over_budget = False
        self._mask_sha256 = None
        return True

    # --- steps --------------------------------------------------------------------------------------------------

    def plan(self, manifest: Manifest) -> list[DeviceCommand] | None:
        """The next step towards a plan; None when there is one."""
        if self._is_planned:
            return None
        if self._is_planning:
            return []
        self._is_planning = True
        return [Plan(self._run, manifest, self._limit)]

    def open(self, manifest: Manifest, mask: Mask, mask_sha256: str) -> list[DeviceCommand] | None:
        """The next step towards an engine for a mask; None when it is open, or cannot be opened."""
        if self._mask_sha256 == mask_sha256 or self.is_over_budget:
            return None
        if self._is_preparing:
            return []
        self._is_preparing = True
        return [Prepare(self._run, manifest, mask, mask_sha256)]

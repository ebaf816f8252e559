"""How far a device's engine is prepared for a run: the memory plan, then the mask that it was opened with."""

from __future__ import annotations

from .device_events import DeviceCommand, Plan, Planned, Prepare, Prepared
from .documents import RunDocument
from .graph_files import GraphFile
from .manifest import Manifest
from .mask import Mask

__all__ = ["Preparation"]


class Preparation:
    """The engine of one run, as the state machine knows it.

    Args:
        run: What it is prepared for; answers about other runs mean nothing.

    Attributes:
        peak_mib: Planned peak of the process; 0 before there is a plan.
        files: Graphs that the plan would use besides the artifact's own.
    """

    def __init__(self, run: RunDocument) -> None:
        self._run = run
        self.peak_mib = 0.0
        self.files: tuple[GraphFile, ...] = ()
        self._is_planned = self._is_planning = self._is_preparing = False
        self._mask_sha256: str | None = None

    def planned(self, event: Planned) -> None:
        """Take the answer to :class:`Plan`."""
        if event.run == self._run.run:
            self.peak_mib, self.files = event.peak_mib, event.files
            self._is_planned, self._is_planning = True, False

    def prepared(self, event: Prepared) -> None:
        """Take the answer to :class:`Prepare`."""
        if event.run == self._run.run:
            self._mask_sha256, self._is_preparing = event.mask_sha256, False

    def plan(self, manifest: Manifest) -> list[DeviceCommand] | None:
        """The next step towards a plan; None when there is one."""
        if self._is_planned:
            return None
        if self._is_planning:
            return []
        self._is_planning = True
        return [Plan(self._run, manifest)]

    def open(self, manifest: Manifest, mask: Mask, mask_sha256: str) -> list[DeviceCommand] | None:
        """The next step towards an engine for a mask; None when it is open."""
        if self._mask_sha256 == mask_sha256:
            return None
        if self._is_preparing:
            return []
        self._is_preparing = True
        return [Prepare(self._run, manifest, mask, mask_sha256)]

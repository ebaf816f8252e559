"""Everything that `fedzo simulate` can be told. Imports nothing that computes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from ..protocol.settings import RunSettings
from ..simulation.settings import SimulationSettings

__all__ = ["SimulateSettings"]


@dataclass(frozen=True, slots=True)
class SimulateSettings(RunSettings):
    """A run's settings and the virtual world around it.

    Attributes:
        artifact: Folder of ``fedzo export``.
        data: Samples of all devices.
        test_data: The server's own test set.
        output: Where the result is written, as JSON.
        processes: Processes that compute; 0 for one a core, 1 for none but this one.
        world: The virtual world.
    """

    artifact: Path | None = None
    data: Path | None = None
    test_data: Path | None = None
    output: Path | None = None
    processes: int = 0
    world: SimulationSettings = field(default_factory=SimulationSettings)

    def run_settings(self) -> RunSettings:
        """The part that a run has."""
        return RunSettings(**{each.name: getattr(self, each.name) for each in dataclasses.fields(RunSettings)})

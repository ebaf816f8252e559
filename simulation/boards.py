"""The boards that virtual devices pretend to be: what they fit, and how long they take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..edge_runtime.datasets.data import Dataset
from ..edge_runtime.planning.calibration import board_rates, predicted_query_s
from ..edge_runtime.planning.run_plan import Limits, plan_run
from ..hardware_profiles import load_profile
from ..protocol.artifact.manifest import Manifest
from ..protocol.errors import ConfigError, FedzoError
from ..protocol.perturbation.streams import Purpose, uint64s
from ..protocol.settings import RunSettings
from .settings import SimulationSettings, parse_boards

__all__ = ["Board", "choose_boards"]

_DESK_MIB = 1 << 20
_DEFAULT = "virtual"


@dataclass(frozen=True, slots=True)
class Board:
    """One kind of device.

    Attributes:
        profile: Name of the hardware profile; ``virtual`` for none.
        ram_budget_mib: What it allows.
        sample_s: Predicted seconds of one sample's way through the whole network; 0 without a profile.
        peak_mib: Planned peak.
        micro_batch: Of the plan.
        refusal: Why the run does not fit; None if it does.
    """

    profile: str
    ram_budget_mib: float
    sample_s: float
    peak_mib: float
    micro_batch: int
    refusal: FedzoError | None = None

    def duration_s(self, sample_passes: float) -> float:
        """Virtual seconds of so much work; overhead outside the network's passes is not counted."""
        return sample_passes * self.sample_s


def choose_boards(
    manifest: Manifest, run: RunSettings, settings: SimulationSettings, datasets: Dataset, n_devices: int
) -> tuple[list[Board], list[int]]:
    """The kinds of boards, and which of them every device is.

    The time of a query is that of ``fedzo plan``: rates out of the profile, no board was timed. Passes through a part
    of the network take the same part of the time.

    Args:
        manifest: Of the artifact.
        run: Of the run.
        settings: Name the boards.
        datasets: One device's samples; their memory counts in its plan.
        n_devices: Virtual devices.

    Returns:
        The boards, and a number among them for every device, drawn from the seed.

    Raises:
        ConfigError: There is no such profile, or it does not say how fast the board is.
    """
    wanted = settings.micro_batch or None
    shares = parse_boards(settings.boards)
    if not shares:
        return [_planned(_DEFAULT, _DESK_MIB, 1, 0.0, manifest, run, datasets, wanted)], [0] * n_devices
    boards = []
    for name, _ in shares:
        profile = load_profile(name)
        rates = board_rates(profile)
        if manifest.work is None or rates is None:
            what = f"the profile {name} does not say what its cores do" if manifest.work else "the artifact is too old"
            raise ConfigError(f"{what}: no time can be predicted", hint="use another board, or export again")
        board = _planned(profile.name, profile.ram_budget_mib, profile.threads, 0.0, manifest, run, datasets, wanted)
        batch, micro_batch = run.training.batch, max(1, board.micro_batch)
        query_s = predicted_query_s(manifest.work, rates, batch=batch, micro_batch=micro_batch, threads=profile.threads)
        boards.append(
            Board(board.profile, board.ram_budget_mib, query_s / batch, board.peak_mib, micro_batch, board.refusal)
        )
    ends = np.cumsum([share for _, share in shares])
    words = uint64s(settings.seed, Purpose.CHANCE, 0, 0, n_devices)
    drawn = np.searchsorted(ends[:-1], words.astype(np.float64) * 2.0**-64, side="right")
    return boards, drawn.tolist()


def _planned(
    name: str,
    budget_mib: float,
    threads: int,
    sample_s: float,
    manifest: Manifest,
    run: RunSettings,
    dataset: Dataset,
    micro_batch: int | None,
) -> Board:
    try:
        plans, _ = plan_run(manifest, run, dataset, Limits(budget_mib, threads=threads), micro_batch)
    except FedzoError as error:
        if name == _DEFAULT or isinstance(error, ConfigError):
            raise
        return Board(name, budget_mib, sample_s, 0.0, 0, error)
    peak_mib = max(plan.planned_peak_mib for plan in plans)
    return Board(name, budget_mib, sample_s, peak_mib, min(plan.micro_batch for plan in plans))

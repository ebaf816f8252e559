"""One cell from its settings to its row: ``python -m benchmarks.learning.measure`` reads the cell as JSON."""

from __future__ import annotations

import datetime as dt
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.protocol.errors import FedzoError
from fedzo.simulation.boards import choose_boards
from fedzo.simulation.clients import load_clients
from fedzo.simulation.result import Progress, SimulationResult
from fedzo.simulation.simulate import simulate

from .build import artifact_of, run_settings, world_settings
from .cells import Cell
from .data import Parts, prepare
from .settings import TORCH

__all__ = ["MAX_BYTES_UP", "measure"]

MAX_BYTES_UP = 4096.0  # a report, everything around its scalars included
_PILOT = 2  # rounds that tell what a round costs
_FEWEST, _MOST = 3, 50  # points of a curve
_EVALUATION = 0.15  # of the budget, beside it, goes to evaluations: they are forward passes too


def measure(cell: Cell, data_folder: Path, work: Path) -> dict[str, Any]:
    """Run one cell.

    Args:
        cell: What to run.
        data_folder: With the ``.npz`` files.
        work: Folder for artifacts and unpacked data, which cells share.

    Returns:
        The fields of the cell, and what came of it. ``sample_forwards`` are those of training; those of pruning stand
        beside them in ``pruning_sample_forwards``.

    Raises:
        FedzoError: The settings do not fit, training diverged, or reports took more than :data:`MAX_BYTES_UP`.
    """
    parts = Parts(prepare(data_folder, cell.data, cell.part, work))
    started = time.perf_counter()
    if cell.method in TORCH:
        from .torch_reference import backprop, fedavg

        found = (backprop if cell.method == "backprop" else fedavg)(cell, parts, work)
    else:
        found = _simulated(cell, parts, work)
    names = ("data", "method", "mask", "world", "budget", "seed", "scale", "part", "settings")
    row = {"key": cell.key, **{name: getattr(cell, name) for name in names}, "budget_sf": cell.budget_sf, **found}
    row["seconds"] = time.perf_counter() - started
    row["date"] = dt.datetime.now(dt.timezone.utc).date().isoformat()
    return row


def _simulated(cell: Cell, parts: Parts, work: Path) -> dict[str, Any]:
    channels = int(parts.x.shape[1])
    artifact, world = artifact_of(cell, channels, work), world_settings(cell)
    data, test = (parts.x, parts.y), (parts.xt, parts.yt)
    pilot = simulate(artifact, run_settings(cell, _PILOT), data, None, world)
    if not cell.settings["participants"]:  # there what boards send on joining outweighs a few rounds
        _check_bytes(cell, pilot)  # before hours are spent
    rounds = max(1, int(cell.budget_sf * _PILOT / pilot.sample_forwards))
    points = 1 if cell.part == "validation" else int(_EVALUATION * cell.budget_sf / len(parts.xt))
    every = max(1, -(-rounds // min(max(points, _FEWEST), _MOST)))
    settings = run_settings(cell, rounds, every)

    seen: list[float | None] = [None]

    def watch(progress: Progress) -> None:
        if progress.accuracy != seen[0]:
            seen[0] = progress.accuracy
            at = f"{progress.sample_forwards:,.0f} SF: {100 * (progress.accuracy or 0.0):.2f} %"
            print(f"{cell.key} {at}", file=sys.stderr, flush=True)

    found = simulate(artifact, settings, data, test, world, on_progress=watch)
    _check_bytes(cell, found)
    manifest = load_artifact(artifact).manifest
    clients = load_clients(data, manifest, world, len(world_devices(cell)))
    (board, *_), _ = choose_boards(manifest, settings, world, clients.dataset(0), 1)
    return {"rounds": rounds, "planned_mib": board.peak_mib, **_outcome(found, len(parts.xt))}


def _check_bytes(cell: Cell, found: SimulationResult) -> None:
    sent = found.bytes_up_per_device_round
    if sent > MAX_BYTES_UP:
        raise FedzoError(f"{cell.key}: a device sends {sent:,.0f} bytes a round, over {MAX_BYTES_UP:,.0f}")


def world_devices(cell: Cell) -> range:
    """Numbers of the devices."""
    return range(int(cell.settings["devices"]))


def _outcome(found: SimulationResult, n_test: int) -> dict[str, Any]:
    reports = sum(row.reports for row in found.rounds)
    return {
        "accuracy": found.accuracy,
        "n_test": n_test,
        "sample_forwards": found.sample_forwards,
        "pruning_sample_forwards": found.scoring_sample_forwards,
        "curve": [[row.sample_forwards, row.test_accuracy] for row in found.curve],
        "loss_queries": found.queries_per_device_round * reports,
        "queries_per_device_round": found.queries_per_device_round,
        "scalars_per_device_round": found.scalars_per_device_round,
        "bytes_up_per_device_round": found.bytes_up_per_device_round,
        "bytes_down_per_device_round": found.bytes_down_per_device_round,
        "sparsity": found.mask.sparsity,
        "training_seconds": found.training_wall_s,
        "engine_share": found.engine_share,
        "digest": found.digest,
    }


def main() -> None:
    """Read a cell and two folders from standard input, print the row."""
    asked: Mapping[str, Any] = json.load(sys.stdin)
    cell = Cell(**asked["cell"])
    try:
        row = measure(cell, Path(asked["data"]), Path(asked["work"]))
    except FedzoError as error:
        row = {"key": cell.key, **asked["cell"], "accuracy": None, "error": error.message}
    sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

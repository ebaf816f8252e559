"""From the flat settings of a cell to those of a run, and the artifacts that cells share."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedzo.exporter.artifact import export_artifact
from fedzo.protocol.errors import ConfigError
from fedzo.protocol.replay.optimisers import OptimiserConfig
from fedzo.protocol.settings import RunSettings, SaliencySettings, TrainingSettings
from fedzo.simulation.settings import SimulationSettings

from .cells import Cell
from .data import CLASSES
from .settings import MASKS

__all__ = ["artifact_of", "run_settings", "world_settings"]

MODEL = "lenet5"
_FORMS: dict[str, Any] = {"": TrainingSettings, "optimiser": OptimiserConfig, "saliency": SaliencySettings}
_WORLD = ("split", "devices", "participants", "local_heads", "sections", "sgd_steps")


def run_settings(cell: Cell, rounds: int, evaluate_every: int = 0) -> RunSettings:
    """What the coordinator and the devices are told.

    Raises:
        ConfigError: A setting has no such name or value.
    """
    parts: dict[str, dict[str, Any]] = {"": {}, "optimiser": {}, "saliency": {}, "run": {}}
    for name, value in cell.settings.items():
        part, _, field = name.rpartition(".")
        if name in _WORLD:
            continue
        known = [each.name for each in dataclasses.fields(_FORMS.get(part, RunSettings))] if part in parts else []
        if field not in known:
            raise ConfigError(f"{cell.group}: there is no setting {name!r}")
        parts[part][field] = value
    optimiser = OptimiserConfig(**{"beta1": 0.9, "beta2": 0.99, **parts["optimiser"]})
    training = TrainingSettings(**{**parts[""], "rounds": rounds, "optimiser": optimiser})
    devices = int(cell.settings["devices"])
    participants = int(cell.settings["participants"])
    return RunSettings(
        seed=1000 + cell.seed,
        sparsity=MASKS[cell.mask],
        saliency=SaliencySettings(**parts["saliency"]),
        training=training,
        devices=devices,
        participants=participants,
        quorum=participants or devices,
        deadline_s=1e6,
        enrol_deadline_s=1e6,
        evaluate_every=evaluate_every,
        **parts["run"],
    )


def world_settings(cell: Cell) -> SimulationSettings:
    """Who holds which samples."""
    return SimulationSettings(devices=int(cell.settings["devices"]), split=cell.settings["split"], seed=1 + cell.seed)


def artifact_of(cell: Cell, channels: int, work: Path) -> Path:
    """The exported network, made when it is not there yet."""
    heads, sparsity = bool(cell.settings.get("local_heads")), MASKS[cell.mask]
    classes, sections = CLASSES[cell.data], int(cell.settings.get("sections", 2))
    kind = "heads" if heads else "plain" if sections == 2 else f"sections{sections}"
    name = f"{MODEL}-{channels}-{classes}-{sparsity:g}-{kind}-{cell.seed}"
    folder = work / "artifacts" / name
    with _locked(work / f"{name}.lock"):
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            shape = (channels, 32, 32)
            export_artifact(MODEL, shape, classes, sparsity, cell.seed, folder, local_heads=heads, sections=sections)
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

"""The memory plan of a run against what the device's part of the protocol really holds."""

from __future__ import annotations

import dataclasses
import gc
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzo.edge_runtime.planning.run_plan import Limits, past_rounds_bytes, plan_run
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.exporter.artifact import export_artifact
from fedzo.protocol.artifact.manifest import Manifest
from fedzo.protocol.device_side.parts import start_replica
from fedzo.protocol.perturbation.directions import MAX_POSITION
from fedzo.protocol.pruning.mask import Mask
from fedzo.protocol.replay.update import Replica
from fedzo.protocol.settings import RunSettings, TrainingSettings
from fedzo.protocol.wire.documents import RunDocument
from tests.edge_runtime.federation import INPUT_SHAPE, N_CLASSES, loader, write_data

LIMITS = Limits(4096.0)


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Manifest]:
    """With and without local heads."""
    found = {}
    for local_heads in (False, True):
        folder = tmp_path_factory.mktemp("plans") / "lenet5"
        export_artifact("lenet5", (1, 32, 32), 10, 0.0, 1, folder, local_heads=local_heads)
        found[local_heads] = load_artifact(folder).manifest
    return found


def run_settings(estimator: Any, staleness: int, **more: Any) -> RunSettings:
    training = TrainingSettings(estimator=estimator, k=20, tail_k=3000, batch=8)
    return RunSettings(training=training, sparsity=0.0, staleness=staleness, **more)


def replica_of(settings: RunSettings, manifest: Manifest) -> Replica:
    run = RunDocument("run-1", "ab" * 32, 1_000, settings)
    return start_replica(run, manifest, Mask.dense(manifest.layout))


def held_after(replica: Replica, updates: int) -> int:
    """Bytes that so many updates add to what a replica holds."""
    block = len(replica.blocks) - 1
    gc.collect()
    tracemalloc.start()
    for number in range(updates):
        segments = ((block * MAX_POSITION, 2),)
        replica.prepare(replica.index, number, 2.0**-10, segments, np.full(2, 0.5, np.float32))
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return held


@pytest.mark.parametrize("estimator", ["node", "coordinate", "local"])
def test_coordinates_of_earlier_rounds_are_planned(manifests: dict[bool, Manifest], estimator: str) -> None:
    """Late scalars stand for the coordinates of their own round, so that a board keeps those of some rounds."""
    manifest, staleness = manifests[estimator == "local"], 6
    settings = run_settings(estimator, staleness)
    measured = held_after(replica_of(settings, manifest), staleness + 2)
    planned = past_rounds_bytes(settings, manifest)
    assert measured > 8 * 20 * staleness  # it keeps them
    assert measured - 4096 <= planned <= 1.1 * measured + 8192


@pytest.mark.parametrize("snapshots", [False, True])
def test_late_reports_count_in_the_plan_of_a_run(
    manifests: dict[bool, Manifest], tmp_path: Path, snapshots: bool
) -> None:
    manifest = manifests[False]
    dataset = loader(write_data(tmp_path / "data.npz"), 0.2)(INPUT_SHAPE, N_CLASSES)

    def feeds_bytes(settings: RunSettings) -> float:
        return plan_run(manifest, settings, dataset, LIMITS, 8)[0][0].feeds_mib * 2**20

    for estimator, k in (("node", 3000), ("coordinate", 20), ("stein", 0)):
        late = run_settings(estimator, 4, snapshots=snapshots)
        more = feeds_bytes(late) - feeds_bytes(dataclasses.replace(late, staleness=0))
        copies = 3 if snapshots else 1
        assert 4 * 8 * k * copies <= more <= copies * (4 * 8 * k + 4 * 512) + 1
        assert (more > 0) is (k > 0)

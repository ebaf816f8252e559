"""Predicted times: how they depend on the work and on the board, and what they are beside a measured one."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.planning.calibration import Rates, board_rates, calibrate, predicted_query_s
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.hardware_profiles import list_profiles, load_profile
from fedzo.protocol.artifact.graph_work import GraphWork
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import Manifest, golden_batch
from fedzo.protocol.errors import ArtifactError
from fedzo.protocol.pruning.mask import Mask

WORK = GraphWork(1_000_000, 40_000, 200_000, 20)
RATES = Rates(2e9, 1e9)


def test_time_grows_with_the_work_and_falls_with_the_rates() -> None:
    base = predicted_query_s(WORK, RATES, batch=32, micro_batch=32)
    assert 0 < base < predicted_query_s(WORK, RATES, batch=64, micro_batch=32) <= 2 * base
    assert base < predicted_query_s(WORK, RATES, batch=32, micro_batch=8)
    assert base > predicted_query_s(WORK, RATES, batch=32, micro_batch=32, threads=4) > base / 4
    for field in dataclasses.fields(GraphWork):
        more = dataclasses.replace(WORK, **{field.name: 2 * getattr(WORK, field.name)})
        assert predicted_query_s(more, RATES, batch=32, micro_batch=32) > base
    for faster in (Rates(4e9, 1e9), Rates(2e9, 2e9), Rates(2e9, 1e9, 0.5)):
        assert predicted_query_s(WORK, faster, batch=32, micro_batch=32) < base


def test_every_board_has_rates() -> None:
    for board in list_profiles():
        rates = board_rates(board)
        assert rates is not None
        assert rates.is_copy_assumed == (board.memcpy_mb_s is None)
        assert board.memcpy_mb_s is None or board.memcpy_mb_s >= 1000  # the stand-in is the slowest
    zero, five = board_rates(load_profile("rpi-zero-2w")), board_rates(load_profile("rpi-5-8gb"))
    assert zero is not None
    assert five is not None
    slow, fast = (predicted_query_s(WORK, rates, batch=32, micro_batch=32) for rates in (zero, five))
    assert slow > 2 * fast
    assert board_rates(dataclasses.replace(load_profile("rpi-zero-2w"), macs_per_cycle=None)) is None


@pytest.mark.parametrize(
    "raw", [{}, {"operators": 1}, {**WORK.to_json(), "operators": -1}, {**WORK.to_json(), "operators": 1.5}]
)
def test_malformed_work_is_refused(raw: dict[str, object]) -> None:
    with pytest.raises(ArtifactError):
        GraphWork.from_json(raw)
    assert GraphWork.from_json(WORK.to_json()) == WORK


def test_prediction_beside_a_measured_query(tmp_path: Path) -> None:
    exporter = pytest.importorskip("fedzo.exporter.artifact", reason="fedzo[server] is not installed")
    exporter.export_artifact("lenet5", (1, 32, 32), 10, 0.0, 1, tmp_path / "artifact")
    artifact = load_artifact(tmp_path / "artifact")
    manifest = artifact.manifest
    assert manifest.work is not None
    # Two convolutions and three dense layers of LeNet-5.
    products = 28 * 28 * 6 * 25 + 10 * 10 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 10
    assert manifest.work.sample_multiply_accumulates == products
    weights = initial_weights(manifest.layout, manifest.seed)
    x, y = golden_batch(manifest.input_shape, manifest.n_classes, 1, 32)
    seconds = []
    with Engine(artifact, Mask.dense(manifest.layout), layout="portable") as engine:
        for _ in range(12):
            started = time.perf_counter()
            engine.loss(weights, x, y)
            seconds.append(time.perf_counter() - started)
    predicted = predicted_query_s(manifest.work, calibrate(), batch=32, micro_batch=32)
    # A busy machine, other processors and older releases are far off the one that the constants were fitted on.
    assert 0.1 < predicted / statistics.median(seconds) < 10


def test_an_artifact_of_an_older_version_has_no_work(tiny: Any) -> None:
    old = dataclasses.replace(tiny.artifact.manifest, work=None)
    assert b"sample_bytes" not in old.encode()
    assert Manifest.decode(old.encode()) == old
    new = dataclasses.replace(old, work=WORK)
    assert Manifest.decode(new.encode()).work == WORK


def test_calibration_gives_rates_of_a_computer() -> None:
    rates = calibrate()
    assert 1e8 < rates.multiply_accumulates_per_s < 1e13
    assert 1e8 < rates.copy_bytes_per_s < 1e12

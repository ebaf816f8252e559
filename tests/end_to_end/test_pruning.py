"""Whole runs with every method of pruning and with removed weights that keep their values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from fedzo.broker_server.history.replay import replay_run
from fedzo.exporter.reference import forward
from fedzo.protocol.artifact.layout import initial_weights
from tests.end_to_end.conftest import MakeFleet
from tests.end_to_end.fleet import agree, images

SHORT = ("--rounds", 3, "--k", 4, "--tail-k", 32, "--repeats", 2)


@pytest.mark.parametrize("estimator", ["stein", "node"])
def test_removed_weights_keep_their_values_to_the_deployed_model(
    estimator: str, fleets: MakeFleet, tmp_path: Path
) -> None:
    fleet = fleets()
    server, boards = fleet.serve("--fill", "init", "--estimator", estimator, *SHORT), fleet.devices()
    answer = server.answer()
    digest = agree(answer, [board.answer() for board in boards])
    _, coordinator = replay_run(fleet.path)
    manifest, mask = coordinator.manifest, coordinator.mask
    assert (coordinator.replica.digest.hex(), mask.fill) == (digest, "init")
    dense = mask.filled(coordinator.replica.weights, manifest.seed)
    start = initial_weights(manifest.layout, manifest.seed)
    assert np.array_equal(dense[~mask.kept], start[~mask.kept])
    assert not np.array_equal(dense[mask.kept], start[mask.kept])

    deployed = fleet.fedzo("deploy", fleet.path, "-o", tmp_path / "model.onnx")
    assert deployed["nonzero"] > answer["survivors"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    pixels, labels = images(4)
    x = pixels.astype(np.float32) / np.float32(255)
    (logits,) = session.run(None, {"x": x})
    np.testing.assert_allclose(logits, forward("lenet5", manifest.layout, dense, x), rtol=1e-4, atol=1e-5)
    # The server's test set is these images: its last evaluation is the deployed model's.
    evaluation = coordinator.evaluations[-1]
    powers = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(powers).sum(axis=1)) - powers[np.arange(len(x)), labels]
    assert evaluation["server_samples"] == len(x)
    assert evaluation["server_loss"] == pytest.approx(float(losses.mean()), rel=1e-4)
    assert evaluation["server_accuracy"] == pytest.approx(float((logits.argmax(axis=1) == labels).mean()))


@pytest.mark.parametrize(
    ("method", "options", "largest"),
    [
        ("ntk-sap", ("--saliency-steps", 2), 0),
        ("synflow", ("--saliency-steps", 5), 0),
        ("erk", (), 68),
        ("random", (), 68),
    ],
)
def test_a_run_with_each_method(method: str, options: tuple[object, ...], largest: int, fleets: MakeFleet) -> None:
    fleet = fleets()
    server = fleet.serve("--pruning", method, "--floor", 7, *options, *SHORT)
    boards = fleet.devices()
    answer = server.answer()
    agree(answer, [board.answer() for board in boards])
    _, coordinator = replay_run(fleet.path)
    layout = coordinator.manifest.layout
    assert coordinator.mask.sparsity == pytest.approx(0.9, abs=1e-3)
    maskable = [k for k, p in enumerate(layout.parameters) if p.maskable]
    assert coordinator.mask.counts()[maskable].min() >= 7
    masks = fleet.entries("mask")
    assert len(masks) == (2 if method == "ntk-sap" else 1)
    assert not largest or answer["mask_bytes"] == largest


def test_a_board_whose_scores_are_off_is_reported_and_trains_on(fleets: MakeFleet) -> None:
    fleet = fleets()
    server = fleet.serve("--quorum", 2, "--pruning", "diagonal", *SHORT)
    boards = [fleet.device(0), fleet.device(1), fleet.device(2, rig="scores:1.05")]
    answer = server.answer()
    agree(answer, [board.answer() for board in boards])
    (refusal,) = answer["refusals"]
    assert refusal.startswith("board-2: its scores differ from the server's by 5.00e-02")
    assert "board-2: its scores differ" in server.stderr


def test_a_floor_that_cannot_be_kept_is_refused(fleets: MakeFleet) -> None:
    fleet = fleets()
    server = fleet.serve("--floor", 4000)
    assert server.wait() == 3
    assert "a floor of 4000 survivors in 5 layers" in server.error["message"]

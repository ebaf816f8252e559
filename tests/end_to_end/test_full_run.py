"""Runs in which nothing goes wrong: every broker gives the same weights, the journal replays, the model deploys."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from fedzo.broker_server.brokers.mosquitto import find_mosquitto
from fedzo.broker_server.history.replay import replay_run
from fedzo.exporter.reference import forward
from tests.end_to_end.conftest import Finished, MakeFleet
from tests.end_to_end.fleet import agree, images


def test_every_device_ends_with_the_servers_weights(undisturbed: Finished) -> None:
    server = undisturbed.server
    assert (server["rounds"], server["refused"], server["devices"]) == (6, 0, 3)
    assert server["parameters"] == 15116
    assert server["survivors"] < 0.15 * server["parameters"]
    assert server["curve"]
    # One mask, six updates and two evaluations, by three devices.
    assert server["reports"] == 3 * (1 + 6 + 2)
    assert sum(device["queries"] for device in undisturbed.devices) == server["queries"]
    assert all(device["declined"] == device["dropped"] == 0 for device in undisturbed.devices)


def test_training_changes_the_weights(undisturbed: Finished) -> None:
    digests = {entry.payload for entry in undisturbed.fleet.entries("update")}
    assert len(digests) == 6
    _, coordinator = replay_run(undisturbed.fleet.path)
    before = coordinator.replica.weights.copy()
    coordinator.replica.restore_from_start()
    assert np.abs(coordinator.replica.weights - before).max() > 1e-3


def test_the_journal_alone_gives_the_weights_again(undisturbed: Finished) -> None:
    folder, coordinator = replay_run(undisturbed.fleet.path)
    assert coordinator.replica.digest.hex() == undisturbed.digest
    assert coordinator.replica.index == 6
    assert folder.path.name == undisturbed.server["run"]


@pytest.mark.parametrize("broker", ["embedded", "external"])
def test_the_result_does_not_depend_on_the_broker(
    broker: str, undisturbed: Finished, fleets: MakeFleet, request: pytest.FixtureRequest
) -> None:
    place = {"url": request.getfixturevalue("mosquitto_url")} if broker == "external" else {"broker": broker}
    fleet = fleets(**place)
    server, devices = fleet.serve(), fleet.devices()
    assert agree(server.answer(), [device.answer() for device in devices]) == undisturbed.digest
    assert ("embedded amqtt" if broker == "embedded" else "external broker") in server.stderr


@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
def test_mosquitto_is_what_auto_chooses(undisturbed: Finished) -> None:
    assert "broker: mosquitto" in undisturbed.fleet.processes[0].stderr


@pytest.mark.parametrize("kind", ["logits", "softmax"])
def test_the_deployed_model_needs_nothing_but_onnxruntime(undisturbed: Finished, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.onnx"
    answer = undisturbed.fleet.fedzo("deploy", undisturbed.fleet.path, "-o", path, "--kind", kind)
    assert answer["weights_digest"] == undisturbed.digest
    assert 0 <= answer["largest_difference"] <= answer["tolerance"]
    assert answer["nonzero"] <= undisturbed.server["survivors"]

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["x"]
    x = images(4)[0].astype(np.float32) / np.float32(255)
    (output,) = session.run(None, {"x": x})
    assert np.abs(output - expected_output(undisturbed, x, kind)).max() < 1e-4


def expected_output(run: Finished, x: NDArray[np.float32], kind: str) -> NDArray[np.float64]:
    """The network in torch and double precision, with the weights that the journal gives."""
    _, coordinator = replay_run(run.fleet.path)
    layout = coordinator.manifest.layout
    dense = np.zeros(layout.size, np.float32)
    dense[coordinator.mask.kept] = coordinator.replica.weights
    logits = forward("lenet5", layout, dense, x)
    if kind == "logits":
        return logits
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


@pytest.mark.slow
def test_a_network_learns(fleets: MakeFleet, tmp_path: Path) -> None:
    """And can be deployed on the way."""
    fleet = fleets()
    options = ("--rounds", 60, "--k", 64, "--learning-rate", 0.02, "--sparsity", 0.5, "--evaluate-every", 10)
    server, devices = fleet.serve(*options), fleet.devices()
    fleet.await_entries("update", 5)
    early = fleet.fedzo("deploy", fleet.path, "-o", tmp_path / "early.onnx")
    answer = server.answer()
    agree(answer, [device.answer() for device in devices])
    assert 5 <= early["updates"] < 60
    assert early["weights_digest"] != answer["weights_digest"]
    losses = [json.loads(entry.payload)["server_loss"] for entry in fleet.entries("evaluation")]
    assert losses[-1] < 0.7 * losses[0]
    assert answer["accuracy"] > 0.6  # four classes, the largest of them half of the test set
    assert [updates for updates, _ in answer["curve"]] == [10, 20, 30, 40, 50, 60]

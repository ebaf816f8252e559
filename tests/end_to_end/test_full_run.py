"""Runs in which nothing goes wrong: every broker gives the same weights, the journal replays, the model deploys."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from fedzo.broker_server.brokers.mosquitto import find_mosquitto
from fedzo.broker_server.replay import replay_run
from tests.end_to_end.conftest import Finished, MakeFleet
from tests.end_to_end.fleet import CLASSES, agree, images


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
    pixels, labels = images(4)
    (output,) = session.run(None, {"x": pixels.astype(np.float32) / 255})
    assert output.shape == (len(labels), CLASSES)
    if kind == "softmax":
        np.testing.assert_allclose(output.sum(axis=1), 1.0, rtol=1e-5)
    # The server evaluated the same weights on the same images.
    accuracy = float((output.argmax(axis=1) == labels).mean())
    assert accuracy == pytest.approx(undisturbed.server["accuracy"], abs=1.01 / len(labels))

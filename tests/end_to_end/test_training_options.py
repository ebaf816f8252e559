"""Averages, adapted directions and sigma, and a learning rate found by queries, with real processes."""

from __future__ import annotations

import json
import signal

from fedzo.broker_server.history.replay import replay_run
from fedzo.broker_server.history.run_folder import RunFolder
from fedzo.broker_server.tuning import SUFFIX
from fedzo.protocol.wire.documents import Announcement, parse
from tests.end_to_end.conftest import MakeFleet
from tests.end_to_end.fleet import agree

ADAPTED = ("--k-max", 40, "--adapt-sigma", "--assign", "shared", "--ema", 0.7, "--schedule", "step", "--warmup", 1)


def test_an_adapted_run_ends_alike_everywhere_and_is_deployed_as_its_average(fleets: MakeFleet) -> None:
    fleet = fleets(2)
    server, boards = fleet.serve(*ADAPTED, "--evaluate-every", 2), fleet.devices()
    answer = server.answer()
    agree(answer, [board.answer() for board in boards])
    assert answer["evaluated"] == "average"

    _, coordinator = replay_run(fleet.path)
    average, digest = coordinator.replica.evaluated()
    assert digest != coordinator.replica.digest
    assert coordinator.evaluations[-1]["weights"] == "average"
    heads = [parse(Announcement, entry.payload) for entry in fleet.entries("announce")]
    trained = [head for head in heads if head.phase == "train"]
    assert any(16 < head.k <= 40 for head in trained)
    assert any(head.sigma not in (0.0, 0.001) for head in trained)

    deployed = fleet.fedzo("deploy", fleet.path, "-o", fleet.folder / "model.onnx")
    assert deployed["weights"] == "average"
    assert deployed["weights_digest"] == digest.hex()
    assert len(average) == answer["survivors"]


def test_a_learning_rate_is_found_and_trained_with(fleets: MakeFleet) -> None:
    """The devices stay for the run that follows, and start it from the initial weights."""
    fleet = fleets(2)
    server = fleet.serve("--learning-rate", "auto", "--tune-rounds", 40, "--sparsity", 0, "--k", 48)
    boards = fleet.devices()
    answer = server.answer()
    agree(answer, [board.answer() for board in boards])
    tuning = RunFolder.open(fleet.path.with_name(f"{fleet.path.name}{SUFFIX}"))
    _, test = replay_run(tuning.path)
    assert test.finished
    assert test.range_test is not None
    assert test.evaluations == []
    assert answer["learning_rate"] == test.range_test.rate()
    assert 1e-4 < answer["learning_rate"] < 1.0

    _, coordinator = replay_run(fleet.path)
    assert coordinator.run.settings.tune_rounds == 0
    assert coordinator.replica.index == answer["rounds"] == 6
    assert coordinator.run.training.rate(3) < answer["learning_rate"]
    assert json.loads((tuning.path / "serve.json").read_text()) == json.loads((fleet.path / "serve.json").read_text())


def test_a_range_test_whose_server_is_killed_goes_on_to_its_run(fleets: MakeFleet, mosquitto_url: str) -> None:
    """Also when the run that follows has not begun when the range test ends."""
    fleet = fleets(2, url=mosquitto_url)
    auto = ("--learning-rate", "auto", "--tune-rounds", 30, "--sparsity", 0, "--k", 48)
    server = fleet.serve(*auto, rig="after:update:12")
    boards = fleet.devices()
    assert server.wait() == -signal.SIGKILL
    wanted, fleet.path = fleet.path, fleet.path.with_name(f"{fleet.path.name}{SUFFIX}")
    answer = fleet.resume().answer()
    agree(answer, [board.answer() for board in boards])
    fleet.path = wanted
    assert answer["run"] == wanted.name
    assert len(fleet.entries("update")) == answer["rounds"] == 6

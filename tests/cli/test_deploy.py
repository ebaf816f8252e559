"""`fedzo deploy`: what it says of a model that somebody else will use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from benchmarks.long_journal import write_journal
from fedzo.broker_server.history.replay import begin_run
from fedzo.broker_server.history.run_folder import PLACE_NAME, RunFolder
from fedzo.broker_server.journal import SqliteJournal
from fedzo.cli.main import main
from fedzo.exporter.artifact import export_artifact
from fedzo.protocol.settings import RunSettings, SaliencySettings, TrainingSettings

PLANNED = 3


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy") / "artifact"
    export_artifact("lenet5", (1, 32, 32), 10, 0.8, 1, folder)
    return folder


def run_of(artifact: Path, runs: Path, updates: int, place: dict[str, Any] | None) -> RunFolder:
    text = None if place is None else json.dumps(place)
    folder = RunFolder.create(runs, artifact, name="small", place=text)
    training = TrainingSettings(rounds=PLANNED, k=4, assignment="shared")
    settings = RunSettings(saliency=SaliencySettings(method="random"), devices=2, quorum=2, training=training)
    with SqliteJournal(folder.journal_path) as journal:
        if updates:
            write_journal(journal, folder.document(settings), folder.artifact.manifest, ["a", "b"], updates)
        else:
            begin_run(journal, folder.document(settings))
    return folder


KNOWN = {"test_data": "/data/test.npz", "test_mean": [0.3], "test_std": [0.35], "test_pad": False}
BYTES = "float32 N,1,32,32: bytes / 255 (other numbers as they are)"
AS_TEST_SET = "as the server's test set and so the boards' data"


@pytest.mark.parametrize(
    ("place", "mean", "text"),
    [
        (KNOWN, [0.3], f"{BYTES}, minus mean 0.3, by std 0.35, {AS_TEST_SET}"),
        ({**KNOWN, "test_mean": [], "test_std": []}, [], f"{BYTES}, {AS_TEST_SET}"),
        (
            {**KNOWN, "test_mean": [], "test_pad": True},
            [],
            BYTES.replace("bytes", "smaller images centred in zeros, bytes") + f", by std 0.35, {AS_TEST_SET}",
        ),
        ({}, None, "float32 N,1,32,32: as the boards' --mean and --std made them, which the server does not know"),
        (None, None, "float32 N,1,32,32: as the boards' --mean and --std made them, which the server does not know"),
    ],
)
def test_what_the_input_must_be(
    artifact: Path,
    tmp_path: Path,
    place: dict[str, Any] | None,
    mean: list[float] | None,
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = run_of(artifact, tmp_path, PLANNED, place), tmp_path / "model.onnx"
    assert main(["deploy", str(run.path), "-o", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert (answer["input"], answer["input_mean"]) == (text, mean)
    assert f"input\t{text}" in printed.err
    assert "warning" not in printed.err
    properties = {item.key: item.value for item in onnx.load(out).metadata_props}
    assert properties["fedzo.input"] == text
    assert json.loads(properties.get("fedzo.input.mean", "null")) == mean


def test_a_damaged_note_of_the_place_is_no_reason_to_fail(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(artifact, tmp_path, PLANNED, KNOWN)
    (run.path / PLACE_NAME).write_text('{"test_data": "x", "test_mean": [null]}')
    assert main(["deploy", str(run.path), "-o", str(tmp_path / "model.onnx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["input_mean"] is None


@pytest.mark.parametrize(
    ("updates", "said"), [(0, "0 of 3 updates: not trained yet"), (2, "2 of 3 updates: not done: fedzo serve --resume")]
)
def test_a_run_that_is_not_done(
    artifact: Path, tmp_path: Path, updates: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(artifact, tmp_path, updates, KNOWN)
    assert main(["deploy", str(run.path), "-o", str(tmp_path / "model.onnx"), "--json"]) == 0
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert (answer["updates"], answer["updates_planned"]) == (updates, PLANNED)
    assert f"warning: {said}" in printed.err

"""`fedzo serve`: what a resumed run takes over, and what it refuses to change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedzo.broker_server.journal import SqliteJournal
from fedzo.broker_server.replay import begin_run
from fedzo.broker_server.run_folder import RunFolder
from fedzo.cli.main import main
from fedzo.exporter.artifact import export_artifact
from fedzo.protocol.settings import RunSettings, TrainingSettings


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three devices and 7 rounds that nobody has joined yet."""
    export_artifact("lenet5", (1, 16, 16), 3, 0.5, 1, tmp_path / "artifact")
    folder = RunFolder.create(tmp_path / "runs", tmp_path / "artifact", name="small")
    settings = RunSettings(devices=3, quorum=3, sparsity=0.5, training=TrainingSettings(rounds=7, learning_rate=0.25))
    with SqliteJournal(folder.journal_path) as journal:
        begin_run(journal, folder.document(settings))
    (folder.path / "serve.json").write_text(json.dumps({"broker": "embedded", "port": 4321}))
    return folder.path


def test_show_config_of_a_resumed_run_shows_its_own_settings(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--resume", str(run), "--show-config", "--port", "99", "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["training.rounds"]["value"] == 7
    assert settings["training.learning_rate"]["value"] == 0.25
    assert settings["quorum"]["value"] == 3
    assert settings["broker"]["value"] == "embedded"
    assert settings["port"]["value"] == 99


@pytest.mark.parametrize("flags", [["--quorum", "2"], ["--rounds", "9"], ["--run", "other"]])
def test_a_resumed_run_keeps_its_settings(run: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--resume", str(run), *flags, "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert "keeps its settings" in error["message"]
    assert "new run" in error["hint"]


def test_a_password_without_a_user_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    password = run / "password"
    password.write_text("secret\n")
    assert main(["serve", "--resume", str(run), "--password-file", str(password), "--json"]) == 3
    assert "--username" in json.loads(capsys.readouterr().out)["error"]["hint"]


def test_an_estimator_that_does_not_fit_leaves_no_run_behind(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--runs", str(tmp_path / "new"), "--broker", "embedded", "--port", "0"]
    assert main(["serve", str(tmp_path / "artifact"), *place, "--estimator", "local", "--json"]) == 3
    assert "--local-heads" in json.loads(capsys.readouterr().out)["error"]["hint"]
    assert not (tmp_path / "new").exists()

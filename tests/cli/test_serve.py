"""`fedzo serve`: what a resumed run takes over, and what it refuses to change."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from fedzo.broker_server.brokers import external
from fedzo.broker_server.history.replay import begin_run
from fedzo.broker_server.history.run_folder import RunFolder
from fedzo.broker_server.journal import SqliteJournal, schema
from fedzo.broker_server.server import Progress
from fedzo.cli.main import main
from fedzo.cli.output import Output
from fedzo.cli.serve_run import _continued, _new_folder, _progress, _test_set
from fedzo.cli.serve_settings import ServeSettings
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.exporter.artifact import export_artifact
from fedzo.protocol.settings import RunSettings, TrainingSettings

SAME = ["--devices", "3", "--quorum", "3", "--rounds", "7", "--learning-rate", "0.25"]


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


@pytest.mark.parametrize("how", ["--resume", "--continue"])
def test_a_journal_of_an_older_schema_goes_on(
    run: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read as it is, then brought up to date by the writer; the broker, which is not there, comes after that."""
    monkeypatch.setattr(external, "_TIMEOUT_S", 0.5)
    path = run / "journal.sqlite"
    with SqliteJournal(path, read_only=True) as journal:
        entries = [entry for _, entry in journal.read()]
    path.unlink()
    with closing(sqlite3.connect(path)) as old:
        schema.MIGRATIONS[0](old)
        rows = [(entry.kind, entry.round, entry.device, entry.payload, entry.at) for entry in entries]
        old.executemany("INSERT INTO entry (kind, round, device, payload, at) VALUES (?, ?, ?, ?, ?)", rows)
        old.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        old.execute("PRAGMA user_version = 1")
        old.commit()
    command = ["--resume", str(run)]
    if how == "--continue":
        command = [str(tmp_path / "artifact"), "--runs", str(run.parent), "--run", run.name, "--continue", *SAME]
    assert main(["serve", *command, "--broker", "mqtt://127.0.0.1:1"]) == 5
    with closing(sqlite3.connect(path)) as new:
        assert new.execute("PRAGMA user_version").fetchone() == (len(schema.MIGRATIONS),)
        assert new.execute("SELECT count(*) FROM entry").fetchone() == (1,)


def test_continue_begins_a_run_that_was_killed_as_it_began(run: Path, tmp_path: Path) -> None:
    (run / "journal.sqlite").unlink()
    settings = ServeSettings(artifact=tmp_path / "artifact", runs=run.parent, run=run.name, continue_run=True)
    assert _continued(settings) == (settings, None)
    SqliteJournal(run / "journal.sqlite").close()
    assert _continued(settings) == (settings, None)
    folder = _new_folder(settings, port=77)
    assert json.loads((folder.path / "serve.json").read_text())["port"] == 77


def test_an_estimator_that_does_not_fit_leaves_no_run_behind(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--runs", str(tmp_path / "new"), "--broker", "embedded", "--port", "0"]
    assert main(["serve", str(tmp_path / "artifact"), *place, "--estimator", "local", "--json"]) == 3
    assert "--local-heads" in json.loads(capsys.readouterr().out)["error"]["hint"]
    assert not (tmp_path / "new").exists()


def test_the_test_set_is_brought_into_the_boards_form(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As fedzo-device join does with a board's data; a resumed run keeps it."""
    x = np.random.default_rng(0).integers(0, 256, (5, 1, 14, 12)).astype(np.uint8)
    np.savez(tmp_path / "test.npz", x_train=x, y_train=np.arange(5) % 3)
    settings = ServeSettings(
        test_data=tmp_path / "test.npz", test_mean=(0.25,), test_std=(0.5,), test_pad=True, sparsity=0.5
    )
    manifest = load_artifact(tmp_path / "artifact").manifest
    found = _test_set(settings, manifest)
    assert found is not None
    batch = found.batch(np.arange(5))
    assert batch.x.shape == (5, 1, 16, 16)
    np.testing.assert_allclose(batch.x[:, :, 1:15, 2:14], (x / 255 - 0.25) / 0.5, atol=1e-6)
    (run / "serve.json").write_text(json.dumps({"broker": "embedded", **settings.place()}))
    assert main(["serve", "--resume", str(run), "--show-config", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["settings"]
    assert (shown["test_mean"]["value"], shown["test_std"]["value"], shown["test_pad"]["value"]) == (
        [0.25],
        [0.5],
        True,
    )


@pytest.mark.parametrize(
    ("flags", "code", "reason"),
    [
        (["--test-mean", "0.5"], 3, "--test-data"),
        (["--test-pad"], 3, "--test-data"),
        (["--test-std", "a,b"], 2, "list of numbers"),
        (["--rule", "median"], 3, "--assign shared"),
        (["--rule", "krum", "--hostile", "2", "--assign", "shared", "--quorum", "4"], 3, "--quorum 7"),
        (["--rule", "krum", "--hostile", "2", "--assign", "shared", "--devices", "6"], 3, "--quorum 7"),
        (["--estimator", "coordinate", "--k-max", "128"], 3, "--k-max"),
        (["--sparsity", "0", "--fill", "init"], 3, "--fill"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_that_do_not_fit_are_refused(
    run: Path, tmp_path: Path, flags: list[str], code: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tmp_path / "artifact"), "--runs", str(tmp_path / "new"), *flags, "--json"]) == code
    said = capsys.readouterr()
    assert reason in said.out + said.err
    assert not (tmp_path / "new").exists()


def test_synflow_where_it_is_not_defined_leaves_no_run_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_artifact("resnet8", (1, 8, 8), 3, 0.5, 1, tmp_path / "artifact")
    place = ["--runs", str(tmp_path / "new"), "--broker", "embedded", "--port", "0"]
    assert main(["serve", str(tmp_path / "artifact"), *place, "--pruning", "synflow", "--json"]) == 3
    assert "--pruning diagonal" in json.loads(capsys.readouterr().out)["error"]["hint"]
    assert not (tmp_path / "new").exists()


def test_lines_about_progress_begin_with_the_first_round(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who joins is told board by board."""
    document = RunFolder.open(run).document(RunSettings(training=TrainingSettings(rounds=7)))
    with _progress(Output(), document) as show:
        show(Progress("enrol", 0, 0, 7, devices=1, ready=0, accuracy=None))
        show(Progress("saliency", 1, 0, 7, devices=3, ready=3, accuracy=None))
    assert capsys.readouterr().err == "saliency: update 0/7, 3 of 3 devices ready\n"

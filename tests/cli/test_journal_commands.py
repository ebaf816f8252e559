"""`fedzo replay` and `fedzo inspect` on the folder of a run."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.long_journal import write_journal
from fedzo.broker_server.history.run_folder import RunFolder
from fedzo.broker_server.journal import Entry, SqliteJournal
from fedzo.cli.main import main
from fedzo.protocol.settings import RunSettings, SaliencySettings, TrainingSettings
from tests.edge_runtime.conftest import write_artifact

DEVICES, ROUNDS = 5, 12


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run in the middle of its 13th round."""
    write_artifact(tmp_path / "artifact")
    folder = RunFolder.create(tmp_path / "runs", tmp_path / "artifact", name="small")
    training = TrainingSettings(rounds=20, k=4, assignment="shared", learning_rate=0.01)
    pruning = SaliencySettings(method="random")
    settings = RunSettings(sparsity=0.5, saliency=pruning, devices=DEVICES, quorum=2, training=training)
    names = [f"pi-{number}" for number in range(DEVICES)]
    with SqliteJournal(folder.journal_path) as journal:
        write_journal(journal, folder.document(settings), folder.artifact.manifest, names, ROUNDS, open_share=0.4)
    return folder


def answer(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_replay(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    last = answer(capsys, "replay", run.path, "--recount")
    assert (last["run"], last["round"], last["updates"], last["is_last"]) == ("small", ROUNDS + 1, ROUNDS, True)
    assert last["recounted"] == ROUNDS
    assert last["checked"]["announce"] == ROUNDS + 1
    assert answer(capsys, "replay", run.path, "--round", ROUNDS)["weights_digest"] == last["weights_digest"]
    earlier = answer(capsys, "replay", run.path, "--round", 3)
    assert (earlier["updates"], earlier["is_last"], earlier["recounted"]) == (3, False, None)
    assert earlier["weights_digest"] != last["weights_digest"]
    assert main(["replay", str(run.path)]) == 0
    assert last["weights_digest"] in capsys.readouterr().out


def test_replay_while_a_server_writes(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with SqliteJournal(run.journal_path):
        assert answer(capsys, "replay", run.path)["updates"] == ROUNDS


@pytest.mark.parametrize("arguments", [["replay"], ["inspect"]])
def test_a_round_that_is_not_there(run: RunFolder, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    error = answer(capsys, *arguments, run.path, "--round", 99, code=3)["error"]
    assert error["message"] == f"the journal has no round 99: it ends with round {ROUNDS + 1}"
    assert answer(capsys, *arguments, run.path.parent, code=3)["error"]["message"].endswith("it has no journal.sqlite")
    assert main([*arguments, str(run.path), "--round", "0"]) == 2


def _no_schema(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")


@pytest.mark.parametrize("command", ["replay", "inspect", "status", "deploy", "serve --resume"])
@pytest.mark.parametrize("begin", [Path.touch, _no_schema, lambda path: SqliteJournal(path).close()])
def test_a_run_whose_start_was_killed(
    tmp_path: Path, begin: Callable[[Path], None], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_artifact(tmp_path / "artifact")
    folder = RunFolder.create(tmp_path / "runs", tmp_path / "artifact", name="small")
    begin(folder.journal_path)
    more = ["-o", tmp_path / "model.onnx"] if command == "deploy" else []
    error = answer(capsys, *command.split(), folder.path, *more, code=6)["error"]
    assert error["message"].endswith(
        "journal.sqlite is empty: it has 0 entries, and a run that has begun has at least 1"
    )
    assert error["hint"].endswith("begin the run again: fedzo serve ARTIFACT --run small")
    again = RunFolder.create(tmp_path / "runs", tmp_path / "artifact", name="small")
    assert again.path == folder.path


@pytest.mark.parametrize("command", ["replay", "inspect"])
def test_a_journal_without_its_beginning(run: RunFolder, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    run.journal_path.unlink()
    with SqliteJournal(run.journal_path) as journal:
        journal.append([Entry("enrolment", 0, "pi-0", b"", 1.0)])
    error = answer(capsys, command, run.path, code=6)["error"]
    assert error["message"].endswith("has no entry of the kind run, the first of every run, among its 1")


@pytest.mark.parametrize("command", ["replay", "inspect", "deploy", "serve --resume"])
def test_a_run_that_lost_its_artifact(run: RunFolder, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run.artifact_path)
    error = answer(capsys, *command.split(), run.path, code=6)["error"]
    assert error["message"] == f"the run {run.path} has lost its folder artifact"
    assert error["hint"].startswith(f"copy it back to {run.artifact_path}")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("unable to open database file", "check the rights"),
        ("attempt to write a readonly database", "check the rights"),
        ("disk I/O error", "check the disk"),
    ],
)
def test_a_journal_that_cannot_be_used(
    run: RunFolder, text: str, hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError(text)

    monkeypatch.setattr(sqlite3, "connect", refuse)
    error = answer(capsys, "inspect", run.path, code=1)["error"]
    assert text in error["message"]
    assert error["hint"].startswith(hint)


def test_replay_of_a_changed_journal(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    connection = sqlite3.connect(run.journal_path)
    connection.execute("DROP TRIGGER entries_stay_as_they_are")
    sequence, payload = connection.execute(
        "SELECT sequence, payload FROM entry WHERE kind = 'update' AND round = 5"
    ).fetchone()
    connection.execute(
        "UPDATE entry SET payload = ? WHERE sequence = ?", (payload[:-1] + bytes([payload[-1] ^ 64]), sequence)
    )
    connection.commit()
    connection.close()
    error = answer(capsys, "replay", run.path, code=6)["error"]
    assert error["message"].startswith(f"entry {sequence} of the journal (update, round 5) does not follow")
    assert answer(capsys, "replay", run.path, "--round", 4)["updates"] == 4


def test_inspect_a_run(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "inspect", run.path)
    assert (found["devices"], len(found["rounds"])) == (DEVICES, ROUNDS + 1)
    assert found["entries"]["report"] == DEVICES * ROUNDS + 2
    *closed, last = found["rounds"]
    assert {(row["reports"], row["usable"], row["ending"]) for row in closed} == {(DEVICES, DEVICES, "close")}
    assert (last["reports"], last["usable"], last["ending"]) == (2, None, "")
    assert main(["inspect", str(run.path), "--last", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines[-3:]] == ["11", "12", "13"]
    assert lines[-1].split("\t")[7] == "open"


def test_inspect_a_round(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "inspect", run.path, "--round", ROUNDS + 1)
    assert found["asked"] == DEVICES
    assert [row["what"] for row in found["devices"]] == ["reported"] * 2 + ["silent"] * 3
    assert {row["scalars"] for row in found["devices"]} == {0, 4}
    assert main(["inspect", str(run.path), "--round", "2"]) == 0
    assert capsys.readouterr().out.count("reported") == DEVICES


def test_inspect_and_replay_count_updates_alike(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """From 1, and the last one has the number of all."""
    updates = 0
    for round_ in (1, 5, ROUNDS):
        updates = answer(capsys, "replay", run.path, "--round", round_)["updates"]
        outcome = answer(capsys, "inspect", run.path, "--round", round_)["outcome"]
        assert outcome.startswith(f"update {updates}: 4 scalars, weights ")
    assert updates == ROUNDS

"""`fedzo simulate`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzo.cli.main import main
from fedzo.simulation.result import Progress
from fedzo.simulation.simulate import simulate
from tests.simulation.conftest import CLASSES, SIDE, images


def fedzo(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedzo.cli", "simulate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fedzo.exporter.artifact import export_artifact

    folder = tmp_path_factory.mktemp("simulate")
    export_artifact("lenet5", (1, SIDE, SIDE), CLASSES, 0.0, 1, folder / "lenet")
    (x, y), (xt, yt) = images(1, 80), images(2, 40)
    np.savez(folder / "data.npz", x_train=x, y_train=y, x_test=xt, y_test=yt)
    return folder


SMALL = ("--devices", 8, "--per-round", 3, "--quorum", 1, "--rounds", 2, "--k", 4, "--batch", 4, "--processes", 1)


def test_a_simulation_from_the_command_line(folder: Path) -> None:
    done = fedzo(folder / "lenet", "--data", folder / "data.npz", *SMALL, "--json", "-o", folder / "out.json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["devices"], len(answer["rounds"]), len(answer["curve"])) == (8, 2, 1)
    assert answer["devices_agree"] is True
    assert answer["settings"]["participants"] == 3
    assert 0.0 <= answer["accuracy"] <= 1.0
    assert json.loads((folder / "out.json").read_text())["digest"] == answer["digest"]
    table = fedzo(folder / "lenet", "--data", folder / "data.npz", *SMALL)
    assert table.returncode == 0
    assert f"weights digest\t{answer['digest']}" in table.stdout
    assert "update 2/2" in table.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("--data", "DATA", "--split", "even"), 3, "the split is 'even'"),
        (("--data", "DATA", "--boards", "rpi-zero-3"), 3, "no hardware profile"),
        (("--data", "DATA", "--boards", "rpi-zero-2w:many"), 3, "NAME:SHARE"),
        (("--data", "DATA", "--dropout", "1.5"), 3, "dropout is 1.5"),
        (("--data", "DATA", "--devices", "81"), 3, "81 parts"),
        (("--data", "DATA", "--per-round", "9"), 3, "participants is 9"),
        (("--data", "DATA", "--split", "natural"), 3, "whose samples"),
        (("--data", "DATA", "--estimator", "magic"), 3, "stein"),
        (("--data", "DATA", "--sparsity", "0.5"), 3, "without pruning"),
        (("--data", "DATA", "--processes", "-1"), 3, "number of processes is -1"),
        (("--data", "missing.npz"), 3, "no data at missing.npz"),
        (("--data", "DATA", "-o", "nowhere/out.json"), 3, "no folder"),
        (("--data", "DATA", "-o", "."), 3, ". is a folder"),
        (("--data", "DATA", "--estimator", "local"), 3, "export it with --local-heads"),
        (("--data", "DATA", "--dropout", "0.99", "--quorum", "4"), 8, "a longer deadline"),
        ((), 3, "no data are named"),
        (("--broker", "auto"), 2, "no such option"),
    ],
)
def test_wrong_input(folder: Path, arguments: tuple[str, ...], code: int, reason: str) -> None:
    given = [folder / "data.npz" if word == "DATA" else word for word in arguments]
    done = fedzo(folder / "lenet", "--rounds", 1, *given)
    assert done.returncode == code, done.stderr
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_an_artifact_is_needed(folder: Path) -> None:
    done = fedzo("--data", folder / "data.npz")
    assert (done.returncode, "no artifact is named" in done.stderr) == (3, True)
    done = fedzo(folder, "--data", folder / "data.npz")
    assert done.returncode == 6


def words(folder: Path, *more: object) -> list[str]:
    return ["simulate", str(folder / "lenet"), "--data", str(folder / "data.npz"), *map(str, (*SMALL, *more))]


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_computed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(words(folder, "-o", tmp_path / "file" / "out.json")) == 3
    assert "there is no folder for" in capsys.readouterr().err

    def read_only(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", read_only)
        assert main(words(folder, "-o", tmp_path / "out.json")) == 3
    printed = capsys.readouterr()
    assert f"cannot write {tmp_path}/out.json: Read-only file system" in printed.err
    assert "update" not in printed.err
    earlier = tmp_path / "earlier.json"
    earlier.write_text("what an earlier run found")
    with monkeypatch.context() as patch:
        patch.setattr("fedzo.cli.simulate_run.simulate", lambda *_, **__: pytest.fail("it computed"))
        patch.setattr(Path, "open", read_only_for(earlier))
        assert main(words(folder, "-o", earlier)) == 3
    assert earlier.read_text() == "what an earlier run found"


def read_only_for(path: Path) -> Any:
    usual = Path.open

    def refuse(self: Path, *arguments: Any, **more: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied")
        return usual(self, *arguments, **more)

    return refuse


@pytest.mark.parametrize("is_json", [False, True])
def test_a_result_that_cannot_be_written_is_printed(
    folder: Path, tmp_path: Path, is_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert main(words(folder, "-o", tmp_path / "out.json", *(["--json"] if is_json else []))) == 3
    printed = capsys.readouterr()
    assert "out.json: No space left on device; the result is on stdout" in printed.err
    text = printed.out if is_json else printed.out[printed.out.index("\n{") :]
    assert len(json.loads(text)["rounds"]) == 2


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C works, also where the tests were started in the background and inherited that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("is_json", [False, True])
def test_an_interrupt_leaves_what_there_is(
    folder: Path, tmp_path: Path, is_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any, on_progress: Any, **more: Any) -> Any:
        def watch(progress: Progress) -> None:
            on_progress(progress)
            if len(progress.training) == 1 and progress.phase == "train":
                signal.raise_signal(signal.SIGINT)

        return simulate(*arguments, on_progress=watch, **more)

    monkeypatch.setattr("fedzo.cli.simulate_run.simulate", interrupted)
    out = tmp_path / "out.json"
    assert main(words(folder, "-o", out, "--evaluate-every", 1, *(["--json"] if is_json else []))) == 130
    written = json.loads(out.read_text())
    assert written["interrupted"] is True
    assert [row["round"] for row in written["rounds"]] == [1]
    assert written["settings"]["participants"] == 3
    printed = capsys.readouterr()
    assert "error: interrupted" in printed.err
    assert not is_json or json.loads(printed.out) == written

"""Wrong input: one error line and a hint, the right exit code, no traceback, and nothing is lost."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fedzo.edge_runtime.storage.outbox import Outbox
from fedzo.exporter.artifact import export_artifact
from fedzo.protocol.wire.framing import run_tag
from fedzo.protocol.wire.messages import Report, ReportKind
from tests.end_to_end.conftest import Finished, MakeFleet
from tests.end_to_end.fleet import CLASSES, CLI, DEVICE, RIGGED, SIDE, Process, agree, images


@dataclass(frozen=True)
class Case:
    """A command line that must fail.

    Attributes:
        arguments: After ``fedzo``, or ``fedzo-device`` if it begins with ``join``; names in braces are files of the
            place.
        code: Exit code.
        error: What the error line must say.
        hint: What the hint must say.
        rig: See ``rigged.py``.
    """

    arguments: str
    code: int
    error: tuple[str, ...]
    hint: str
    rig: str = ""


SERVE = "serve {artifact} --runs {runs} --port 0 "
JOIN = "join mqtt://127.0.0.1:1 --state {state} --connect-timeout 1 --data "
CASES = {
    "no artifact folder": Case("serve {nowhere}", 6, ("nowhere",), "fedzo export"),
    "no artifact": Case("serve", 3, ("no artifact",), "fedzo serve"),
    "a graph of another model": Case("serve {swapped}", 6, ("probe.onnx",), ""),
    "a truncated graph": Case("serve {truncated}", 6, ("probe.onnx",), ""),
    "a damaged manifest": Case("serve {damaged}", 6, ("manifest.json",), ""),
    "a manifest that is no JSON": Case("serve {scrambled}", 6, ("manifest.json",), ""),
    "no test data": Case(SERVE + "--test-data {nowhere}", 3, ("nowhere",), ""),
    "test data that are not finite": Case(SERVE + "--test-data {infinite}", 3, ("infinite.npz", "finite"), ""),
    "a label out of range": Case(SERVE + "--test-data {labels}", 3, ("labels.npz", "7"), ""),
    "images of another shape": Case(SERVE + "--test-data {shape}", 3, ("shape.npz", "12", "16"), ""),
    "sparsity above one": Case(SERVE + "--sparsity 1.5", 3, ("sparsity", "1.5", "below 1"), ""),
    "sparsity above one at export": Case(
        "export lenet5 --input 1x16x16 --sparsity 1.5 -o {new}", 3, ("sparsity", "1.5", "below 1"), ""
    ),
    "an unknown model": Case("export lenet6 -o {new}", 3, ("lenet6",), "lenet5"),
    "an export onto something else": Case("export lenet5 -o {data}", 3, ("data",), ""),
    "a quorum above the devices": Case(SERVE + "--devices 3 --quorum 4", 3, ("quorum", "4", "3"), ""),
    "a wrong run name": Case(SERVE + "--run Über", 3, ("run 'Über'",), "a-z"),
    "a wrong federation": Case(SERVE + "--federation a/b", 3, ("federation 'a/b'",), "a-z"),
    "a port in use": Case(
        "serve {artifact} --runs {runs} --port {port}", 5, ("port {port}", "in use"), "--broker mqtt"
    ),
    "a port that is none": Case("serve {artifact} --runs {runs} --port 65536", 3, ("65536",), ""),
    "an unknown broker": Case(SERVE + "--broker rabbit", 3, ("rabbit",), "mosquitto"),
    "no broker": Case(SERVE + "--broker mqtt://127.0.0.1:1", 5, ("127.0.0.1:1",), "", "impatient"),
    "a run that exists": Case("serve {artifact} --runs {runs} --port 0 --run small", 3, ("small exists",), "--resume"),
    "no TOML": Case(SERVE + "--config {broken}", 3, ("broken.toml", "line 2"), ""),
    "an unknown key": Case(SERVE + "--config {unknown}", 3, ("unknown.toml", "roundz"), "rounds"),
    "a value of another type": Case(SERVE + "--config {typed}", 3, ("typed.toml", "rounds", "many"), ""),
    "no settings file": Case(SERVE + "--config {nowhere}", 3, ("nowhere",), ""),
    "no run to resume": Case("serve --resume {artifact}", 3, ("is not the folder of a run",), ""),
    "a damaged journal": Case("serve --resume {corrupt} --port 0", 6, ("journal.sqlite", "damaged"), "copy"),
    "a truncated journal": Case("serve --resume {short} --port 0", 6, ("journal.sqlite",), ""),
    "a run with a damaged artifact": Case("serve --resume {hollow} --port 0", 6, ("probe.onnx",), ""),
    "deployment of no run": Case("deploy {data} -o {new}", 3, ("is not the folder of a run",), ""),
    "deployment onto a file": Case("deploy {run} -o {model}", 3, ("model.onnx exists",), "--overwrite"),
    "deployment onto a folder": Case("deploy {run} -o {data} --overwrite", 3, ("data exists",), "another file"),
    "deployment of a damaged journal": Case("deploy {corrupt} -o {new}", 6, ("journal.sqlite", "damaged"), "copy"),
    "a profile with a typo": Case("profiles show rpi-zero-w2", 3, ("rpi-zero-w2",), "rpi-zero-2w"),
    "a device profile with a typo": Case(JOIN + "{good} --profile rpi-zero-w2", 3, ("rpi-zero-w2",), "rpi-zero-2w"),
    "a device without a broker": Case(JOIN + "{good}", 5, ("127.0.0.1:1", "1 s"), ""),
    "a device without data": Case(JOIN + "{nowhere}", 3, ("nowhere",), ""),
    "a device with data of no kind": Case(JOIN + "{broken}", 3, ("broken.toml",), ""),
    "a device with a wrong id": Case(JOIN + "{good} --id Board_1", 3, ("Board_1",), "a-z"),
    "a device with a wrong federation": Case(JOIN + "{good} --federation A", 3, ("federation 'A'",), "a-z"),
    "a device with a wrong URL": Case("join http://broker --state {state} --data {good}", 3, ("http",), "mqtt://"),
    "a device with a wrong number": Case(JOIN + "{good} --ram-budget-mib -5", 3, ("ram_budget_mib", "-5"), ""),
    "a device with a wrong setting": Case(JOIN + "{good} --config {unknown}", 3, ("unknown.toml", "training"), ""),
}


@pytest.fixture(scope="module")
def place(undisturbed: Finished, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Good and bad files by name."""
    base = tmp_path_factory.mktemp("place")
    data = base / "data"
    data.mkdir()
    artifact, run = base / "artifact", base / "runs" / "small"
    shutil.copytree(undisturbed.fleet.artifact, artifact)
    # Readers of the journal leave an empty log and an index beside it, which the next writer removes.
    shutil.copytree(undisturbed.fleet.path, run, ignore=shutil.ignore_patterns("*-wal", "*-shm"))
    (base / "model.onnx").write_bytes(b"precious")

    for name in ("swapped", "truncated", "damaged", "scrambled"):
        shutil.copytree(artifact, base / name)
    export_artifact("lenet5", (1, SIDE, SIDE), CLASSES + 1, 0.9, 1, base / "other")
    shutil.copy(base / "other" / "probe.onnx", base / "swapped" / "probe.onnx")
    graph = (artifact / "probe.onnx").read_bytes()
    (base / "truncated" / "probe.onnx").write_bytes(graph[: len(graph) // 2])
    manifest = (artifact / "manifest.json").read_text()
    assert '"n_classes": 4' in manifest
    (base / "damaged" / "manifest.json").write_text(manifest.replace('"n_classes": 4', '"n_classes": "four"'))
    (base / "scrambled" / "manifest.json").write_text(manifest[:-20])

    for name in ("corrupt", "short", "hollow"):
        shutil.copytree(run, base / name)
    journal = bytearray((run / "journal.sqlite").read_bytes())
    (base / "short" / "journal.sqlite").write_bytes(journal[: len(journal) // 2])
    journal[4096:8192] = bytes(range(256)) * 16
    (base / "corrupt" / "journal.sqlite").write_bytes(journal)
    (base / "hollow" / "artifact" / "probe.onnx").write_bytes(graph[:-1])

    x, y = images(0)
    np.savez(data / "good.npz", x=x, y=y)
    floats = x.astype(np.float32) / np.float32(255)
    floats[3, 0, 1, 2] = np.inf
    np.savez(data / "infinite.npz", x=floats, y=y)
    np.savez(data / "labels.npz", x=x, y=np.where(y == 3, 7, y))
    np.savez(data / "shape.npz", x=x[:, :, 2:14, 2:14], y=y)

    (base / "state").mkdir()
    measured = (np.ones(3, np.float32),)
    undelivered = Report(ReportKind.EVALUATE, run_tag("small"), 7, 1, 3, bytes(16), 0.5, 1, 1, 1, measured)
    Outbox(base / "state" / "outbox").save("small", undelivered)

    (base / "broken.toml").write_text("[training]\nrounds = = 3\n")
    (base / "unknown.toml").write_text("[training]\nroundz = 3\n")
    (base / "typed.toml").write_text('[training]\nrounds = "many"\n')
    with socket.create_server(("127.0.0.1", 0)) as listener:
        names = {path.stem: str(path) for path in (*base.iterdir(), *data.iterdir())}
        yield {
            **names,
            "run": str(run),
            "state": str(base / "state"),
            "nowhere": str(base / "nowhere"),
            "new": str(base / "new"),
            "port": str(listener.getsockname()[1]),
        }


def contents(base: Path) -> dict[str, str]:
    """Hashes of all files that are worth something."""
    passing = ("journal.sqlite.lock", "lock", "session")
    files = [path for path in base.rglob("*") if path.is_file() and path.name not in passing]
    return {str(path.relative_to(base)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name", CASES)
def test_one_error_a_hint_and_nothing_lost(name: str, place: dict[str, str], tmp_path: Path) -> None:
    case, base = CASES[name], Path(place["artifact"]).parent
    before, runs = contents(base), sorted(Path(place["runs"]).iterdir())
    program = DEVICE if case.arguments.startswith("join") else (RIGGED, case.rig, "server") if case.rig else CLI
    arguments = [part.format_map(place) for part in case.arguments.split()]
    process = Process("process", [sys.executable, *program, *arguments, "--json"], tmp_path)
    try:
        code = process.wait(60.0)
    finally:
        process.kill()
    assert code == case.code, process.stderr
    assert "Traceback" not in process.stderr
    lines = process.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, process.stderr
    assert lines[-1].startswith("hint: "), process.stderr
    assert lines[-2] == errors[0]
    for part in case.error:
        assert part.format_map(place) in errors[0]
    assert case.hint in lines[-1]
    assert process.error["exit_code"] == code
    assert errors[0] == f"error: {process.error['message']}"
    assert lines[-1] == f"hint: {process.error['hint']}"

    after = contents(base)
    assert {path: after.get(path) for path in before} == before
    assert sorted(Path(place["runs"]).iterdir()) == runs
    assert not Path(place["new"]).exists()


@pytest.mark.parametrize("program", [CLI, DEVICE], ids=["fedzo", "fedzo-device"])
def test_without_json_stdout_stays_empty(program: tuple[str, ...], tmp_path: Path) -> None:
    arguments = ("profiles", "show", "rpi") if program is CLI else ("profiles", "rpi")
    process = Process("process", [sys.executable, *program, *arguments], tmp_path)
    assert process.wait() == 3
    assert process.stdout == ""
    error, hint = process.stderr.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights(artifact: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    arguments = ("serve", artifact, "--runs", locked / "runs", "--port", 0, "--json")
    process = Process("process", [sys.executable, *CLI, *arguments], tmp_path)
    assert process.wait() == 3
    assert str(locked) in process.error["message"]


def test_devices_that_cannot_take_part_end_and_the_run_goes_on(
    undisturbed: Finished, fleets: MakeFleet, place: dict[str, str]
) -> None:
    """The server needs three good ones; the four others are there first."""
    fleet = fleets()
    good = list(fleet.data)
    server = fleet.serve()
    wanted = {
        "infinite": (3, "finite"),
        "labels": (3, "7"),
        "shape": (3, "12"),
        "good": (4, "budget"),
    }
    fleet.data = [*good, *(Path(place[name]) for name in wanted)]
    bad = [
        fleet.device(3 + number, *(("--ram-budget-mib", 40) if name == "good" else ()))
        for number, name in enumerate(wanted)
    ]
    for device, (name, (code, part)) in zip(bad, wanted.items(), strict=True):
        assert device.wait() == code, (name, device.stderr)
        assert "Traceback" not in device.stderr
        assert part in device.error["message"]
        assert device.error["hint"]
    assert "40" in bad[-1].error["message"]
    fleet.boards = [fleet.device(number) for number in range(3)]
    # Their ordinals come after those of the good ones, so the weights are those of the undisturbed run.
    assert agree(server.answer(), [board.answer() for board in fleet.boards]) == undisturbed.digest


def test_too_few_devices_end_the_server_not_the_run(undisturbed: Finished, fleets: MakeFleet) -> None:
    fleet = fleets()
    fleet.boards = [fleet.device(number, rig="hasty") for number in (0, 1)]
    for board in fleet.boards:
        board.until("no link to")
    server = fleet.serve("--enrol-deadline", 6)
    assert server.wait() == 8, server.stderr
    assert server.error["message"] == "2 devices are ready, the quorum is 3"
    assert f"fedzo serve --resume {fleet.path}" in server.error["hint"]
    fleet.boards.append(fleet.device(2, rig="hasty"))
    fleet.boards[2].until("no link to")
    again = fleet.resume()
    assert agree(again.answer(), [board.answer() for board in fleet.boards]) == undisturbed.digest

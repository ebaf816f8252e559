"""``fedzo-device`` as a process: options, exit codes, signals, and what survives kill -9."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzo.broker_server.brokers.credentials import Credentials
from fedzo.broker_server.brokers.mosquitto import MosquittoBroker, find_mosquitto
from fedzo.edge_runtime.__main__ import main
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.protocol.perturbation.blocks import blocks_of
from fedzo.protocol.pruning.mask import Mask
from fedzo.protocol.replay.update import Replica
from fedzo.protocol.settings import TrainingSettings
from fedzo.protocol.wire.documents import Hello, Presence, RunDocument
from fedzo.protocol.wire.messages import Receipt, Report, Verdict
from fedzo.protocol.wire.topics import Channel
from tests.edge_runtime.federation import FakeServer, export_lenet, run_document, write_data

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "fedzo.edge_runtime"]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("FEDZO_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_lenet(tmp_path_factory.mktemp("main") / "lenet5")


@pytest.fixture(scope="module")
def run(artifact: Path) -> RunDocument:
    return run_document(artifact, seed=5, training=TrainingSettings(k=6, batch=8, rounds=4))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data.npz")


@pytest.fixture
def server(mosquitto: Any, artifact: Path, run: RunDocument) -> Iterator[FakeServer]:
    made = FakeServer(mosquitto.url, artifact, run, signs=True)
    yield made
    made.close()


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``spawn("join", ...)``: a running process; killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def factory(*arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        started.append(process)
        return process

    yield factory
    for process in started:
        process.kill()
        process.communicate()


def finish(*arguments: object, timeout_s: float = 120.0) -> tuple[int, str, str]:
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=timeout_s, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def announce_training(server: FakeServer, artifact: Path, round_: int) -> None:
    manifest = load_artifact(artifact).manifest
    settings, mask = server.run.settings, Mask.dense(manifest.layout)
    blocks = blocks_of(settings.training, manifest, mask)
    replica = Replica(manifest.layout, mask, manifest.seed, settings.seed, blocks, settings.training.optimiser)
    server.announce(round_, "train", log_head=replica.head.hex(), weights_digest=replica.digest.hex())


# --- without a broker -----------------------------------------------------------------------------------------------


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["join", "--help"], ["profiles", "--help"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
    assert "--ram-budget-mib" in capsys.readouterr().out
    assert main(["--version"]) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert list(shown) == ["fedzo", "numpy", "onnxruntime", "paho-mqtt", "python"]
    assert "missing" not in shown.values()


def test_help_loads_no_library() -> None:
    script = (
        "import sys; from fedzo.edge_runtime.__main__ import main\n"
        "try:\n    main(['join', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'numpy', 'onnxruntime', 'paho', 'ssl'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["join", "--threads", "x"], ["join", "--mean", "a,b"], ["join", "--nothing"]]
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "command", "message"),
    [
        ([], "", "give a command: join, doctor, install or profiles"),
        (["join", "mqtt://h", "--bogus"], " join", "no such option: --bogus"),
        (["doctor", "here"], " doctor", "unexpected argument: here"),
        (["join", "--threads", "x"], " join", "argument --threads: invalid int value: 'x'"),
        (["install"], " install", "the following arguments are required: --systemd, --url, --data"),
        (["--bogus"], "", "no such option: --bogus"),
    ],
)
def test_wrong_usage_is_that_of_its_command_and_has_a_hint(
    arguments: list[str], command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for as_json in (False, True):
        with pytest.raises(SystemExit) as end:
            main([*arguments, "--json"] if as_json else arguments)
        assert end.value.code == 2
        said = capsys.readouterr()
        hint = f"fedzo-device{command} --help"
        assert said.err.startswith(f"usage: fedzo-device{command} [")
        assert said.err.endswith(f"\nerror: {message}\nhint: {hint}\n")
        error = {"kind": "UsageError", "message": message, "hint": hint, "exit_code": 2}
        assert (json.loads(said.out) if as_json else said.out) == ({"error": error} if as_json else "")


def test_json_may_come_before_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "profiles", "rpi-zero-2w"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "rpi-zero-2w"


@pytest.mark.parametrize(
    ("arguments", "code", "error", "hint"),
    [
        (["--data", "DATA"], 3, "the setting url has no value", "FEDZO_URL"),
        (["mqtt://h"], 3, "the setting data has no value", "FEDZO_DATA"),
        (["http://h", "--data", "DATA"], 3, "no scheme mqtt://", "mqtts://"),
        (["mqtt://h:99999", "--data", "DATA"], 3, "cannot be read", "mqtt://"),
        (["mqtt://u:secret@h/path", "--data", "DATA"], 3, "goes on after the port", "mqtt://"),
        (["mqtt://h", "--data", "absent.npz"], 3, "there is no data at absent.npz", ".npz"),
        (["mqtt://h", "--data", "pyproject.toml"], 3, "is of no kind that can be read", ".npz"),
        (
            ["mqtt://h", "--data", "DATA", "--profile", "rpi-zero-2"],
            3,
            "no hardware profile",
            "did you mean rpi-zero-2w",
        ),
        (["mqtt://h", "--data", "DATA", "--id", "Upper Case"], 3, "not a valid name", "a-z"),
        (["mqtt://h", "--data", "DATA", "--federation", "a/b"], 3, "not a valid name", "a-z"),
        (["mqtt://h", "--data", "DATA", "--holdout", "1"], 3, "holdout is 1.0", ""),
        (["mqtt://h", "--data", "DATA", "--threads", "0"], 3, "threads is 0", ""),
        (["mqtt://h", "--data", "DATA", "--ram-budget-mib", "nan"], 3, "ram_budget_mib is nan", ""),
        (["mqtt://h", "--data", "DATA", "--password-file", "absent"], 3, "cannot read the password file absent", ""),
        (["mqtt://h", "--data", "DATA", "--ca", "absent.pem"], 3, "without TLS", "mqtts://"),
        (["mqtts://h", "--data", "DATA", "--ca", "absent.pem"], 3, "absent.pem does not exist", ""),
        (["mqtts://h", "--data", "DATA", "--cert", "absent.pem"], 3, "the key is missing", ""),
        (["mqtt://h", "--data", "DATA", "--config", "absent.toml"], 3, "absent.toml", ""),
    ],
)
def test_what_is_wrong_ends_with_its_code(
    arguments: list[str], code: int, error: str, hint: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(data) if part == "DATA" else part for part in arguments]
    assert main(["join", *arguments, "--json"]) == code
    captured = capsys.readouterr()
    assert "secret" not in captured.out + captured.err
    assert "Traceback" not in captured.err
    lines = captured.err.splitlines()
    assert any(line.startswith("error: ") and error in line for line in lines), lines
    if hint:
        assert any(line.startswith("hint: ") and hint in line for line in lines), lines
    (answer,) = captured.out.splitlines()
    assert json.loads(answer)["error"]["exit_code"] == code
    assert error in json.loads(answer)["error"]["message"]


def test_no_broker_ends_with_5(data: Path) -> None:
    code, out, err = finish("join", "mqtt://127.0.0.1:1", "--data", data, "--connect-timeout", 0.5, "--json")
    assert code == 5
    assert "error: no connection to the broker 127.0.0.1:1 within 0.5 s" in err
    answer = json.loads(out)
    assert answer["error"]["kind"] == "BrokerError"
    assert re.fullmatch(r"[a-z0-9-]{1,48}", answer["device"])
    assert "Traceback" not in err


def test_sources_come_in_order(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    config = tmp_path / "device.toml"
    config.write_text(
        'url = "mqtt://u:secret@file"\nthreads = 3\nholdout = 0.5\nprofile = "rpi-zero-2w"\ndata = "x.npz"\n'
    )
    monkeypatch.setenv("FEDZO_THREADS", "2")
    monkeypatch.setenv("FEDZO_FEDERATION", "garden")
    arguments = ["join", "--config", str(config), "--federation", "kitchen", "--mean", "0.5,0.25", "--show-config"]
    assert main([*arguments, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {name: (shown[name]["value"], shown[name]["origin"].split()[0]) for name in shown} == {
        "url": ("mqtt://file:1883", "file"),
        "data": (str(tmp_path / "x.npz"), "file"),
        "federation": ("kitchen", "flag"),
        "id": (None, "default"),
        "ram_budget_mib": (160, "profile"),
        "threads": (2, "environment"),
        "micro_batch": (None, "default"),
        "state": (None, "default"),
        "holdout": (0.5, "file"),
        "mean": ([0.5, 0.25], "flag"),
        "std": (None, "default"),
        "pad": (False, "default"),
        "username": (None, "default"),
        "password_file": (None, "default"),
        "ca": (None, "default"),
        "cert": (None, "default"),
        "key": (None, "default"),
        "connect_timeout": (None, "default"),
        "retry": (5.0, "default"),
        "providers": (["CPUExecutionProvider"], "default"),
        "strict_providers": (False, "default"),
        "log_format": ("text", "default"),
        "log_file": (None, "default"),
        "credentials": (None, "default"),
        "run_key": (None, "default"),
        "profile": ("rpi-zero-2w", "file"),
    }
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "secret" not in out
    assert "threads\t2\tenvironment FEDZO_THREADS" in out


def test_profiles_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles"]) == 0
    assert "rpi-zero-2w\t160 MiB\t4 threads\tRaspberry Pi Zero 2 W" in capsys.readouterr().out.splitlines()
    assert main(["profiles", "rpi-zero-2w", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ram_budget_mib"] == 160
    assert main(["profiles", "rpi-zero-2w"]) == 0
    assert "memcpy_mb_s\t1300\tsbc-bench" in capsys.readouterr().out
    assert main(["profiles", "nothing-like-it"]) == 3


def test_labels_larger_than_the_budget_are_not_unpacked(tmp_path: Path, capsys: Any) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=np.zeros((8, 2), np.uint8), y=np.zeros(2 << 20))
    assert main(["join", "mqtt://h", "--data", str(tmp_path / "d.npz"), "--ram-budget-mib", "8"]) == 3
    assert "unpacks to 16.0 MiB, the limit is 8 MiB" in capsys.readouterr().err


def test_an_unexpected_error_is_one_line(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("odd \x1b[2J")

    monkeypatch.setattr("fedzo.edge_runtime.join.count_samples", fail)
    assert main(["join", "mqtt://h", "--data", str(data)]) == 1
    err = capsys.readouterr().err
    assert "error: unexpected ZeroDivisionError: odd \\x1b[2J" in err
    assert "Traceback" not in err
    assert main(["join", "mqtt://h", "--data", str(data), "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err


# --- with a broker --------------------------------------------------------------------------------------------------


def test_a_run_over_budget_ends_with_4(server: FakeServer, mosquitto: Any, data: Path) -> None:
    code, out, err = finish("join", mosquitto.url, "--data", data, "--ram-budget-mib", 40, "--json")
    assert code == 4
    assert re.search(r"error: lenet5 needs \d+\.\d MiB .*the budget is 40 MiB", err)
    answer = json.loads(out)
    assert (answer["status"], answer["run"], answer["error"]["kind"]) == ("refused", "run-1", "MemoryBudgetError")
    assert "does not fit" in server.expect(Presence, status="refused").detail


def test_a_run_to_its_end(server: FakeServer, mosquitto: Any, artifact: Path, data: Path, spawn: Any) -> None:
    process = spawn("join", mosquitto.url, "--data", data, "--id", "dev-a", "--profile", "rpi-zero-2w", "--json")
    hello = server.expect(Hello)
    assert (hello.profile, hello.ram_budget_mib, hello.samples, hello.holdout) == ("rpi-zero-2w", 160.0, 40, 10)
    assert re.match(r"fedzo \S+, numpy \S+, onnxruntime \S+, paho-mqtt \S+, python \S+$", hello.versions)
    server.expect(Presence, status="ready")
    announce_training(server, artifact, 1)
    report = server.expect(Report)
    server.announce(2, "done")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    answer = json.loads(out)
    assert (answer["status"], answer["device"], answer["reports"], answer["queries"]) == ("done", "dev-a", 1, 7)
    assert report.peak_rss_kib / 1024 - 2 <= answer["peak_rss_mib"] < 160  # the kernel keeps batched counters
    assert err.splitlines()[-1] == "done: 0 updates, 1 reports"
    assert "warning" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_leaves_cleanly(
    server: FakeServer, mosquitto: Any, artifact: Path, data: Path, spawn: Any, number: int, code: int
) -> None:
    server.run = run_document(artifact, seed=5, training=TrainingSettings(k=50_000, batch=8, rounds=4))
    server.send(Channel.RUN, server.run)
    process = spawn("join", mosquitto.url, "--data", data, "--json")
    server.expect(Presence, status="ready")
    announce_training(server, artifact, 1)  # in the middle of a task
    time.sleep(0.5)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert json.loads(out)["status"] == "left"
    left = server.expect(Presence, status="left")
    assert left.session == json.loads(out)["session"]
    server.nothing(Presence, 0.3)  # no will follows


def test_a_killed_device_is_lost_and_its_report_is_not(
    server: FakeServer, mosquitto: Any, artifact: Path, data: Path, spawn: Any, tmp_path: Path
) -> None:
    server.acknowledge = False
    arguments = ("join", mosquitto.url, "--data", data, "--state", tmp_path / "state", "--json")
    first = spawn(*arguments)
    session = server.expect(Presence, status="ready").session
    announce_training(server, artifact, 1)
    payload = server.expect_bytes(Report)[1]
    first.kill()
    first.wait(10)
    assert server.expect(Presence, status="lost").session == session
    assert (tmp_path / "state" / "outbox").is_file()
    second = spawn(*arguments)
    assert server.expect(Hello).session > session
    assert server.expect_bytes(Report)[1] == payload
    server.send(Channel.ACK, Receipt(server.run.tag, 1, Verdict.ACCEPTED), server.expect_device())
    deadline = time.monotonic() + 60
    while (tmp_path / "state" / "outbox").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second.send_signal(signal.SIGTERM)
    out, _ = second.communicate(timeout=120)
    assert json.loads(out)["queries"] == 0


def test_two_processes_cannot_be_one_device(server: FakeServer, mosquitto: Any, data: Path, spawn: Any) -> None:
    spawn("join", mosquitto.url, "--data", data)
    server.expect(Presence, status="ready")
    code, _, err = finish("join", mosquitto.url, "--data", data)
    assert code == 3
    assert "another fedzo-device (process " in err
    assert "--id or --state" in err


@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
def test_a_broker_with_passwords_and_rights(
    artifact: Path, run: RunDocument, data: Path, tmp_path: Path, spawn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = Credentials.generate("default", ["dev-a"])
    broker = MosquittoBroker(port=0, credentials=credentials)
    broker.start()
    password = tmp_path / "password"
    password.write_text(credentials.devices[0].password + "\n")
    password.chmod(0o600)
    server = FakeServer(broker.url, artifact, run, credentials.server.password, signs=True)
    try:
        process = spawn("join", broker.url, "--data", data, "--id", "dev-a", "--password-file", password, "--verbose")
        server.expect(Presence, status="ready")
        announce_training(server, artifact, 1)
        server.expect(Report)
        server.announce(2, "done")
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "did not take" not in err
        assert credentials.devices[0].password not in err

        for wrong in ("FEDZO_PASSWORD=wrong", "FEDZO_PASSWORD="):
            monkeypatch.setenv(*wrong.split("=", 1))
            code, _, err = finish("join", broker.url, "--data", data, "--id", "dev-a")
            assert code == 5  # at once: the same words cannot help later
            assert "not authori" in err.lower() or "password" in err.lower(), err
    finally:
        server.close()
        broker.stop()

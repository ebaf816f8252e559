"""``fedzo-device doctor``: every check passes here, and fails where it should, without taking the process along."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fedzo.broker_server.brokers.credentials import Credentials
from fedzo.broker_server.brokers.mosquitto import MosquittoBroker, ServerTls
from fedzo.edge_runtime.__main__ import main
from fedzo.edge_runtime.inference import forward_check
from fedzo.edge_runtime.installation import doctor, selftest
from fedzo.edge_runtime.installation.doctor import Check, DoctorSettings, diagnose
from fedzo.edge_runtime.installation.selftest import KNOWN_ANSWERS
from fedzo.edge_runtime.installation.wheels import KNOWN_BAD, Processor, known_bad, this_processor
from fedzo.hardware_profiles import load_profile
from fedzo.protocol.errors import ConfigError, SelfTestError
from tests.broker_fixtures import needs_mosquitto
from tests.protocol.golden import cases

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = json.loads((ROOT / "tests" / "protocol" / "golden" / "vectors.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("FEDZO_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))


def findings(**settings: Any) -> dict[str, Check]:
    return {check.name: check for check in diagnose(DoctorSettings(**settings))}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what computes."""
    monkeypatch.setattr(doctor, "_runtime", lambda settings, with_artifact: iter(()))
    monkeypatch.setattr(doctor, "KNOWN_ANSWERS", ())


# --- known answers --------------------------------------------------------------------------------------------------


def test_known_answers_are_the_golden_vectors() -> None:
    answers = {known.name: known.answer for known in KNOWN_ANSWERS}
    directions = GOLDEN["directions"]
    assert answers == {
        "Philox": "".join(f"{word:016x}" for word in GOLDEN["streams"]["uint64s"]),
        "row order": GOLDEN["streams"]["permutation 16384"],
        "Gaussian table": GOLDEN["table"]["sha256"],
        "Hadamard transform": directions["fwht"]["4096"],
        "directions": "".join(directions[name]["direction"][:16] for name in ("gaussian", "rademacher", "hadamard")),
        "replay of 1,000 updates": cases.replay("hadamard", "adam", 2_003, 24).digest.hex(),
    }


def test_another_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(KNOWN_ANSWERS[0], answer="0" * 64)
    with pytest.raises(SelfTestError, match="Philox gives b921edce9f5b131e"):
        wrong.check()
    broken = dataclasses.replace(KNOWN_ANSWERS[1], compute=lambda: str(1 / 0))
    monkeypatch.setattr(doctor, "KNOWN_ANSWERS", (wrong, broken))
    found = findings()
    assert found["Philox"].status == found["row order"].status == "fail"
    assert "ZeroDivisionError" in found["row order"].detail


def test_the_graph_is_what_its_text_says() -> None:
    node, value = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("Conv", ["x", "w1"], ["a"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "w2"], ["c"], kernel_shape=[1, 3], pads=[0, 1, 0, 1]),
        node("Conv", ["c", "w3"], ["d"], kernel_shape=[3, 3], strides=[2, 2], group=16),
        node("Flatten", ["d"], ["e"], axis=1),
        node("Gemm", ["e", "w4"], ["f"], transB=1),
        node("Cast", ["f"], ["logits"], to=TensorProto.DOUBLE),
        node("LogSoftmax", ["logits"], ["y"], axis=1),
    ]
    inputs = [value("x", TensorProto.FLOAT, ["batch", 8, 9, 9])]
    inputs += [value(name, TensorProto.FLOAT, shape) for name, shape in forward_check.WEIGHTS.items()]
    graph = helper.make_graph(nodes, "forward", inputs, [value("y", TensorProto.DOUBLE, ["batch", 10])])
    wanted = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert onnx.load_model_from_string(forward_check.GRAPH) == wanted


# --- ONNX Runtime in a child process --------------------------------------------------------------------------------


@pytest.fixture
def onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``onnxruntime(text)``: child processes import a module with this text instead."""

    def fake(text: str) -> None:
        (tmp_path / "modules").mkdir()
        (tmp_path / "modules" / "onnxruntime.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))

    return fake


@pytest.mark.parametrize("name", ["SIGILL", "SIGSEGV", "SIGABRT"])
def test_a_wheel_that_dies_takes_nothing_along(onnxruntime: Callable[[str], None], name: str) -> None:
    onnxruntime(f"import os, signal\nos.kill(os.getpid(), signal.{name})\n")
    check = findings()["onnxruntime"]
    assert check.status == "fail"
    assert check.detail == f"importing it died with {name}"
    assert check.hint


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("raise ImportError('libgomp.so.1 is not there')", "libgomp.so.1 is not there"),
        ("raise SystemExit('GLIBC_2.28 not found')", "importing it failed: GLIBC_2.28 not found"),
        ("__version__ = '1.0.0'", "AttributeError"),
    ],
)
def test_a_wheel_that_does_not_load(onnxruntime: Callable[[str], None], text: str, detail: str) -> None:
    onnxruntime(text)
    check = findings()["onnxruntime"]
    assert check.status == "fail"
    assert detail in check.detail


def test_a_wheel_that_hangs(onnxruntime: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime("import time\ntime.sleep(300)\n")
    seconds, detail = 1.5, "starting Python"
    while detail.startswith("starting") and seconds < 100:  # a busy machine takes longer until it imports anything
        monkeypatch.setattr(doctor, "CHILD_TIMEOUT_S", seconds)
        detail = findings()["onnxruntime"].detail
        seconds *= 4
    assert detail == f"importing it took more than {seconds / 4:g} s"


def test_a_wheel_that_computes_wrong_is_found(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    right = forward_check.expected(forward_check.seeded())
    monkeypatch.setattr(forward_check, "expected", lambda feeds: right + 1e-3)
    monkeypatch.setattr(sys, "argv", ["forward_check"])
    assert forward_check.main() == 7
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.startswith("failed ")
    assert "wrong by 1.00e-03" in json.loads(last.partition(" ")[2])["message"]
    assert np.exp(right).sum(axis=1) == pytest.approx(1.0)


def test_the_artifacts_known_answer(tiny: Any, tmp_path: Path) -> None:
    found = findings(artifact=tiny.folder)
    assert found["golden loss"].status == found["golden predictions"].status == found["plan"].status == "ok"
    folder = tmp_path / "wrong"
    shutil.copytree(tiny.folder, folder)
    manifest = tiny.artifact.manifest
    golden = dataclasses.replace(manifest.golden, mean_loss=manifest.golden.mean_loss + 0.5)
    (folder / "manifest.json").write_bytes(dataclasses.replace(manifest, golden=golden).encode())
    found = findings(artifact=folder)
    assert found["golden loss"].status == "fail"
    assert "known answer" in found["golden loss"].detail
    assert found["golden predictions"].status == found["onnxruntime"].status == "ok"
    predictions = dataclasses.replace(manifest.golden.predictions, logits=(9.0,) * manifest.golden.batch)
    golden = dataclasses.replace(manifest.golden, predictions=predictions)
    (folder / "manifest.json").write_bytes(dataclasses.replace(manifest, golden=golden).encode())
    found = findings(artifact=folder)
    assert (found["golden loss"].status, found["golden predictions"].status) == ("ok", "fail")
    assert "golden batch are wrong by" in found["golden predictions"].detail
    golden = dataclasses.replace(manifest.golden, predictions=None)
    (folder / "manifest.json").write_bytes(dataclasses.replace(manifest, golden=golden).encode())
    assert findings(artifact=folder)["golden predictions"].status == "warn"  # of an older release
    (folder / "probe.onnx").write_bytes(b"")
    found = findings(artifact=folder)
    assert found["artifact"].status == "fail"
    assert found["onnxruntime"].status == "ok"


def test_execution_providers() -> None:
    found = findings()["execution providers"]
    assert (found.status, found.detail.split()[0]) == ("ok", "CPUExecutionProvider")
    found = findings(providers=("cuda", "cpu"))["execution providers"]
    assert found.status == "warn"
    assert "CUDAExecutionProvider is not there" in found.detail
    found = findings(providers=("cuda", "cpu"), strict_providers=True)["execution providers"]
    assert found.status == "fail"
    with pytest.raises(ConfigError, match="no execution provider"):
        DoctorSettings(providers=("gpu",))


def test_a_wheel_that_changes_the_floating_point_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"onnxruntime": "1", "difference": 0.0, "denormals": False, "provider": "x", "wanted": "x"}
    (found, *_) = doctor._answers({**answer, "available": ["x"]})
    assert (found.name, found.status) == ("onnxruntime", "fail")
    assert "has lost its denormals" in found.detail


# --- releases and processors ----------------------------------------------------------------------------------------

A53 = frozenset({"fp", "asimd", "crc32"})


@pytest.mark.parametrize(
    ("version", "processor", "certain"),
    [
        ("1.21.0", Processor("aarch64", A53), True),
        ("1.21", Processor("aarch64", A53), True),  # Debian 13's own
        ("1.21.0", Processor("aarch64", A53 | {"atomics"}), None),
        ("1.21.0", Processor("armv7l", frozenset({"neon"})), None),
        ("1.21.0", Processor("x86_64", frozenset({"avx"})), None),
        ("1.21.1", Processor("aarch64", A53), None),
        ("1.22.0", Processor("aarch64", A53), False),
        ("1.27.0", Processor("aarch64", A53), None),
        ("1.27.0", Processor("aarch64", A53 | {"atomics", "sme"}), True),
    ],
)
def test_known_bad_releases(version: str, processor: Processor, certain: bool | None) -> None:
    bad = known_bad(version, processor)
    assert (bad and bad.certain) == certain


@pytest.mark.usefixtures("quick")
def test_a_known_bad_release_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "this_processor", lambda: Processor("aarch64", A53, "Cortex-A53", "Zero 2 W"))
    monkeypatch.setattr(doctor, "installed_versions", lambda: {"onnxruntime": "1.21.0"})
    found = findings()
    assert found["onnxruntime release"].status == "fail"
    assert KNOWN_BAD[0].issue in found["onnxruntime release"].detail
    assert found["processor"].detail == "aarch64 Cortex-A53 Zero 2 W"


def test_the_processor_is_read(tmp_path: Path) -> None:
    cpuinfo, model = tmp_path / "cpuinfo", tmp_path / "model"
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd\nCPU part\t: 0xd08\n\nprocessor\t: 1\nFeatures\t: x\n")
    model.write_bytes(b"Raspberry Pi 4 Model B\0")
    read = this_processor(cpuinfo, model, "aarch64")
    assert read == Processor("aarch64", frozenset({"fp", "asimd"}), "Cortex-A72", "Raspberry Pi 4 Model B")
    assert read.armv8_0
    assert this_processor(tmp_path / "none", tmp_path / "none", "riscv64") == Processor("riscv64")


# --- the machine ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_a_clock_that_was_never_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings()["clock"].status == "ok"
    monkeypatch.setattr(doctor, "BUILT", dt.datetime(2100, 1, 1, tzinfo=dt.timezone.utc))
    assert findings()["clock"].status == "warn"
    assert findings(url="mqtts://127.0.0.1:1")["clock"].status == "fail"


@pytest.mark.usefixtures("quick")
def test_denormals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert selftest.keeps_denormals()
    monkeypatch.setattr(doctor, "keeps_denormals", lambda: False)
    assert findings()["denormals"].status == "fail"
    monkeypatch.setattr(doctor, "this_processor", lambda: Processor("armv7l"))
    assert findings()["denormals"].status == "warn"


@pytest.mark.usefixtures("quick")
def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert findings(state=tmp_path / "file" / "x")["disk"].status == "fail"
    usage = shutil.disk_usage(tmp_path)
    for free_mib, status in ((1, "fail"), (40, "warn"), (100, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free_mib: usage._replace(free=free << 20))
        assert findings(state=tmp_path / "new" / "state")["disk"].status == status
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("total", "available", "status"), [(400, 300, "ok"), (400, 100, "warn"), (150, 140, "fail"), (0, 0, "warn")]
)
def test_memory_against_the_profile(
    monkeypatch: pytest.MonkeyPatch, total: float, available: float, status: str
) -> None:
    monkeypatch.setattr(doctor, "total_mib", lambda: total)
    monkeypatch.setattr(doctor, "available_mib", lambda: available)
    assert load_profile("rpi-zero-2w").ram_budget_mib == 160
    found = findings(profile="rpi-zero-2w")
    assert found["memory"].status == status
    assert found["profile"].status == "warn"  # this machine is no aarch64, or another board


@pytest.mark.usefixtures("quick")
def test_a_model_that_does_not_fit(tiny: Any, tmp_path: Path) -> None:
    text = Path(load_profile("generic-x86").origin).read_text().replace("generic-x86", "small")
    path = tmp_path / "small.toml"
    path.write_text(text.replace("ram_budget_mib = 512", "ram_budget_mib = 40"))
    plan = findings(profile=str(path), artifact=tiny.folder)["plan"]
    assert plan.status == "fail"
    assert "use a board with" in plan.hint
    assert "uncompressed" not in plan.hint  # there are no data


@pytest.mark.usefixtures("quick")
def test_wrong_settings_are_no_findings() -> None:
    for wrong in ({"federation": "A b"}, {"id": "../x"}, {"connect_timeout": 0.0}):
        with pytest.raises(ConfigError):
            DoctorSettings(**wrong)
    with pytest.raises(ConfigError, match="there is no hardware profile"):
        findings(profile="rpi-9")


# --- the broker -----------------------------------------------------------------------------------------------------


@needs_mosquitto
@pytest.mark.usefixtures("quick")
def test_broker_credentials_and_rights(tmp_path: Path) -> None:
    credentials = Credentials.generate("default", ["dev-a"])
    good, wrong = tmp_path / "good", tmp_path / "wrong"
    good.write_text(credentials.devices[0].password + "\n")
    wrong.write_text("wrong\n")
    state = tmp_path / "state"
    state.mkdir()
    (state / "id").write_text("dev-a\n")
    with MosquittoBroker(port=0, credentials=credentials) as broker:
        found = findings(url=broker.url, state=state, password_file=good)
        assert found["broker session"].status == "ok", found
        assert "as dev-a" in found["broker session"].detail
        assert found["broker TLS"].status == "warn"
        found = findings(url=broker.url, id="dev-a", password_file=wrong)
        assert found["broker address"].status == "ok"
        assert found["broker"].status == "fail"
        assert good.read_text().strip() not in str(found)
    assert findings(url=broker.url)["broker"].detail == "no connection: Connection refused"


@needs_mosquitto
@pytest.mark.usefixtures("quick")
def test_broker_tls(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    names = ("-subj", "/CN=broker", "-addext", "subjectAltName=DNS:localhost")
    new = (openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30")
    subprocess.run(
        [*new, "-keyout", "key.pem", "-out", "ca.pem", *names], check=True, cwd=tmp_path, capture_output=True
    )
    ca = tmp_path / "ca.pem"
    with MosquittoBroker(port=0, tls=ServerTls(ca, tmp_path / "key.pem")) as broker:
        url = f"mqtts://localhost:{broker.port}"
        found = findings(url=url, ca=ca)
        assert found["broker TLS"].status == "ok"
        assert "valid for 30 days" in found["broker TLS"].detail or "valid for 29 days" in found["broker TLS"].detail
        assert found["broker session"].status == "ok"
        unknown = findings(url=url)["broker"]
        assert unknown.status == "fail"
        assert "self" in unknown.detail
        assert "--ca" in unknown.hint
        other_name = findings(url=f"mqtts://127.0.0.1:{broker.port}", ca=ca)["broker"]
        assert "127.0.0.1" in other_name.detail


@pytest.mark.usefixtures("quick")
def test_a_host_without_an_address() -> None:
    assert "no address" in findings(url="mqtt://nowhere.invalid")["broker"].detail


# --- the commands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["fedzo.edge_runtime", "fedzo.cli"])
def test_as_a_process(package: str, tiny: Any) -> None:
    command = [sys.executable, "-m", package, "doctor", "--artifact", str(tiny.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith(("ok   ", "warn ")) for line in lines)
    assert sum(": " in line for line in lines) == len(lines) > 12
    failing = subprocess.run(
        [*command, "--url", "mqtt://127.0.0.1:1", "--json"], capture_output=True, text=True, timeout=60
    )
    assert failing.returncode == 7
    answer = json.loads(failing.stdout)
    assert [check["name"] for check in answer["checks"] if check["status"] == "fail"] == ["broker"]
    assert "checks failed: broker" in failing.stderr


def test_control_characters_are_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda settings: [Check("broker", "fail", "\x1b[2J")])
    assert main(["doctor"]) == 7
    assert capsys.readouterr().out == "FAIL broker: \\x1b[2J\n"

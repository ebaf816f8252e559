"""Emulated Arm processors: the bits of the protocol, the engine, and a device in a real run.

Emulation proves what is computed; it says nothing about speed or memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.arm import federation
from tests.arm.battery import LENET, MISMATCH, REFERENCE
from tests.arm.federation import EMULATE
from tests.board_fixture import ROOT, pip
from tests.end_to_end.fleet import environment

CANNOT_BUILD = 3


def emulate(*arguments: object, timeout_s: float = 560, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run scripts/emulate-arm."""
    command = [str(part) for part in (EMULATE, *arguments)]
    kept = {name: os.environ[name] for name in ("FEDZO_NO_APT",) if name in os.environ}
    variables = environment(NATIVE_PYTHON=sys.executable, **kept, **extra)
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=variables)


def build(architecture: str) -> None:
    """Build a userland, or skip the test."""
    done = emulate(architecture, "--build", timeout_s=900)
    if done.returncode == CANNOT_BUILD:
        pytest.skip(next(line for line in done.stderr.splitlines() if line.startswith("error: ")))
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def aarch64() -> str:
    """The emulated 64-bit userland."""
    build("aarch64")
    return "aarch64"


@pytest.fixture(scope="session")
def armhf() -> str:
    """The emulated 32-bit userland."""
    build("armhf")
    return "armhf"


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What this machine computes, and the models."""
    from tests.arm.reference import write_reference

    folder = tmp_path_factory.mktemp("reference")
    write_reference(folder)
    return folder


# --- the battery ------------------------------------------------------------------------------------------------------


def battery(architecture: str, cpu: str, reference: Path) -> dict[str, Any]:
    """What one processor answers."""
    done = emulate(architecture, "--cpu", cpu, "-m", "tests.arm.battery", reference, "--cpu", cpu)
    assert done.returncode in (0, MISMATCH), f"{cpu} ended with {done.returncode}:\n{done.stderr[-2000:]}"
    answer: dict[str, Any] = json.loads(done.stdout)
    assert (answer["cpu"], bool(answer["failed"])) == (cpu, done.returncode == MISMATCH)
    return answer


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1200)  # the first one installs the emulator
@pytest.mark.parametrize("cpu", ["cortex-a53", "cortex-a72", "cortex-a76"])
def test_64_bit_processors_compute_the_same(cpu: str, aarch64: str, reference: Path) -> None:
    answer = battery(aarch64, cpu, reference)
    assert answer["failed"] == []
    assert (answer["machine"], answer["denormals"]) == ("aarch64", True)
    assert answer["versions"]["onnxruntime"] in (ROOT / "constraints.txt").read_text()


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1200)
def test_a_32_bit_processor_computes_the_same(armhf: str, reference: Path) -> None:
    """With Debian's own packages, although its numpy flushes denormals to zero."""
    answer = battery(armhf, "cortex-a7", reference)
    assert answer["failed"] == []
    assert (answer["machine"], answer["denormals"]) == ("armv7l", False)


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("architecture", "cpus"), [("aarch64", ["cortex-a53", "cortex-a72", "cortex-a76"]), ("armhf", ["cortex-a7"])]
)
def test_emulated_devices_end_with_the_servers_weights(
    architecture: str, cpus: list[str], request: pytest.FixtureRequest, reference: Path, tmp_path: Path
) -> None:
    """A server and a device of this machine, and a device on each emulated processor."""
    request.getfixturevalue(architecture)
    outcome = federation.run(tmp_path, reference, architecture, cpus)
    answer, devices = outcome["server"], outcome["devices"]
    assert (answer["rounds"], answer["devices"], answer["refused"]) == (6, 1 + len(cpus), 0)
    # One mask, six updates and two evaluations, none of them lost or declined.
    assert [(device["reports"], device["declined"]) for device in devices] == [(9, 0)] * len(devices)
    assert {device["provider"] for device in devices} == {"CPUExecutionProvider"}


# --- doctor -----------------------------------------------------------------------------------------------------------


def doctor(architecture: str, cpu: str, reference: Path, first: str = "") -> tuple[int, dict[str, str], dict[str, str]]:
    """Exit code of `fedzo-device doctor`, and of every check its status and its text."""
    command = ["-m", "fedzo.edge_runtime", "doctor", "--artifact", reference / LENET, "--json"]
    done = emulate(architecture, "--cpu", cpu, *command, GUEST_PYTHONPATH=first)
    assert done.stdout, done.stderr
    checks = json.loads(done.stdout)["checks"]
    status, detail = ({check["name"]: check[key] for check in checks} for key in ("status", "detail"))
    return done.returncode, status, detail


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1200)
def test_doctor_finds_a_board_in_order(aarch64: str, reference: Path) -> None:
    """The other processors have it in the tests of the bundle."""
    code, status, detail = doctor(aarch64, "cortex-a76", reference)
    right = ("onnxruntime", "execution providers", "golden loss", "golden predictions", "denormals")
    assert [status[name] for name in right] == ["ok"] * len(right), (status, detail)
    assert detail["processor"] == "aarch64 Cortex-A76"
    assert (code, "fail" in status.values()) == (0, False), (status, detail)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1200)
def test_doctor_survives_a_wheel_that_dies_on_this_processor(aarch64: str, reference: Path, tmp_path: Path) -> None:
    """onnxruntime 1.21.0 holds instructions that a Cortex-A53 does not have (microsoft/onnxruntime#23957)."""
    options: list[str | Path] = ["--no-deps", "--target", tmp_path, "--platform", "manylinux_2_27_aarch64"]
    options += ["--platform", "manylinux_2_28_aarch64", "--only-binary=:all:", "--python-version", "3.11"]
    pip("install", "--quiet", *options, "--abi", "cp311", "onnxruntime==1.21.0")
    code, status, detail = doctor(aarch64, "cortex-a53", reference, first=str(tmp_path))
    assert (code, status["onnxruntime"], status.get("golden loss")) == (7, "fail", None)
    assert "SIGILL" in detail["onnxruntime"]
    assert status["onnxruntime release"] == "fail"
    assert status["replay of 1,000 updates"] == "ok"


# --- an offline bundle ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("architecture", "cpu", "python", "system_packages"),
    [("aarch64", "cortex-a72", "3.11", False), ("armhf", "cortex-a7", "3.13", True)],
)
def test_a_bundle_installs_on_a_board_without_a_network(
    architecture: str,
    cpu: str,
    python: str,
    system_packages: bool,
    request: pytest.FixtureRequest,
    reference: Path,
    tmp_path: Path,
) -> None:
    """`fedzo bundle` here, ``sh install.sh`` with the board's Python; its last step is doctor with the artifact."""
    request.getfixturevalue(architecture)
    command = [sys.executable, "-m", "fedzo.cli", "bundle", "--platform", architecture, "--python", python]
    command += ["--artifact", str(reference / LENET), "--out", str(tmp_path / "bundle")]
    command += ["--system-packages"] if system_packages else []
    made = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr
    guest = emulate(architecture, "--cpu", cpu, "-c", "import sys; print(sys.executable)")
    variables = {"PYTHON": guest.stdout.strip(), "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/"}
    if architecture == "armhf":  # where a board finds them by links that a package's script makes
        libraries = Path(variables["PYTHON"]).parent.parent / "lib" / "arm-linux-gnueabihf"
        variables["LD_LIBRARY_PATH"] = f"{libraries / 'blas'}:{libraries / 'lapack'}"
    script = ["sh", str(tmp_path / "bundle" / "install.sh"), str(tmp_path / "fedzo")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=500, env=environment(**variables), cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {line.partition(": ")[0][5:]: line[:4].strip() for line in done.stdout.splitlines()[1:-1]}
    right = ("onnxruntime", "execution providers", "golden loss", "golden predictions", "replay of 1,000 updates")
    assert [checks[name] for name in right] == ["ok"] * len(right), done.stdout
    assert checks["denormals"] == ("warn" if architecture == "armhf" else "ok")
    shown = [
        str(tmp_path / "fedzo" / "bin" / "python"),
        "-I",
        "-c",
        "import fedzo.edge_runtime as f; print(f.__file__)",
    ]
    where = subprocess.run(shown, capture_output=True, text=True, timeout=120, env=environment())
    assert where.stdout.startswith(str(tmp_path / "fedzo" / "lib" / f"python{python}")), where.stderr


# --- the battery and the script themselves ----------------------------------------------------------------------------


def native_battery(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.arm.battery", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)


def test_this_machine_passes_its_own_battery(reference: Path) -> None:
    done = native_battery(reference)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer["failed"] == []
    assert not any(answer["differences"].values())


def test_the_battery_notices_every_kind_of_difference(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    numbers = json.loads((reference / REFERENCE).read_text())
    for name in numbers["exact"]:
        numbers["exact"][name] = "00"
    for name, values in numbers["close"].items():
        if not name.startswith("golden"):  # bounded by the artifact's own tolerances
            numbers["close"][name] = [value * 1.01 for value in values]
    numbers["encoded mask"] = numbers["other encoded mask"]
    (tmp_path / REFERENCE).write_text(json.dumps(numbers))
    done = native_battery(tmp_path)
    assert done.returncode == MISMATCH, done.stderr
    compared = [name for name in numbers["close"] if not name.startswith("golden")]
    assert json.loads(done.stdout)["failed"] == [*compared, *numbers["exact"], "mask codec"]


def test_a_machine_without_emulator_says_so(tmp_path: Path) -> None:
    for tool in ("bash", "sed", "grep", "cat", "sha256sum", "mkdir", "flock", "id", "dirname", "basename"):
        found = shutil.which(tool)
        assert found
        (tmp_path / tool).symlink_to(found)
    done = emulate("aarch64", "--build", timeout_s=30, PATH=str(tmp_path))
    assert done.returncode == CANNOT_BUILD, done.stderr
    error, hint = done.stderr.splitlines()
    assert error == "error: this system has no apt-get"
    assert hint == "hint: install qemu-user-static and mmdebstrap"


@pytest.mark.parametrize("arguments", [(), ("mips",), ("aarch64", "--cpu")])
def test_wrong_usage_shows_the_usage(arguments: tuple[str, ...]) -> None:
    done = emulate(*arguments, timeout_s=30)
    assert done.returncode == 2
    assert "scripts/emulate-arm aarch64|armhf" in done.stderr

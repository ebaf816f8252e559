"""`fedzo bundle`: what is in the folder, that it installs without a network, and why one cannot be made."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from fedzo.cli.main import main
from fedzo.exporter import board_wheels
from fedzo.exporter.artifact import export_artifact
from fedzo.exporter.board_wheels import Board, fetch_wheels
from fedzo.exporter.bundle import make_bundle
from fedzo.exporter.install_script import install_script
from fedzo.exporter.own_wheel import write_own_wheel
from fedzo.protocol.errors import ArtifactError, ConfigError
from tests.board_fixture import PACKAGES, ROOT

THIS = Board(platform.machine(), f"3.{sys.version_info.minor}")
PIP = "pip-1-py3-none-any.whl"


def fake_wheel(folder: Path, name: str, *requires: str, version: str = "1") -> Path:
    """A wheel of metadata alone."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {line}" for line in requires]
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n\n")
    return path


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, ...]]:
    """Distributions by name with what they require: what pip fetches here, without any dependency."""
    known: dict[str, tuple[str, ...]] = {"pip": ()}

    def download(board: Board, requirements: Any, folder: Path) -> None:
        for line in requirements:
            asked = Requirement(line)
            version = next(asked.specifier.filter(["1", "0", "2"]))
            fake_wheel(folder, asked.name, *known[asked.name], version=version)

    monkeypatch.setattr(board_wheels, "_download", download)
    return known


# --- wheels -----------------------------------------------------------------------------------------------------------


def test_the_markers_are_the_boards(index: dict[str, tuple[str, ...]], tmp_path: Path) -> None:
    index |= {"new": (), "old": ("deep; python_version < '3.11'",), "deep": (), "arm": ("deep",)}
    requires = (
        "new>=2; python_version >= '3.11'",
        "old; python_version < '3.11'",
        "arm; platform_machine == 'aarch64'",
    )
    wheel = fake_wheel(tmp_path, "fedzo", *requires, "extra; extra == 'server'")
    found = {}
    for machine, python in (("x86_64", "3.10"), ("x86_64", "3.12"), ("aarch64", "3.12")):
        folder = tmp_path / f"{machine}{python}"
        folder.mkdir()
        own = Path(shutil.copy(wheel, folder))
        found[machine, python] = [path.name.split("-")[0] for path in fetch_wheels(Board(machine, python), own, folder)]
    assert found == {
        ("x86_64", "3.10"): ["deep", "fedzo", "old", "pip"],
        ("x86_64", "3.12"): ["fedzo", "new", "pip"],
        ("aarch64", "3.12"): ["arm", "deep", "fedzo", "new", "pip"],
    }


@pytest.mark.parametrize(("limit", "kept"), [("<1", "0"), (">=1", "1"), ("~=2.0", "2"), ("==1,>=0", "1")])
def test_versions_are_what_the_board_is_asked_for(
    index: dict[str, tuple[str, ...]], tmp_path: Path, limit: str, kept: str
) -> None:
    """pip passes over what is asked under a marker of another Python, here by a dependency of a dependency."""
    index |= {"a": (f"b{limit}; python_version < '3.11'", "b<9"), "b": ("c",), "c": ()}
    found = fetch_wheels(Board("aarch64", "3.10"), fake_wheel(tmp_path, "fedzo", "a", "b"), tmp_path)
    assert [path.name.rsplit("-", 3)[0] for path in found] == ["a-1", f"b-{kept}", "c-1", "fedzo-1", "pip-1"]
    assert sorted(tmp_path.iterdir()) == found


def test_what_never_fits_is_told(
    index: dict[str, tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index |= {"a": ("b<1",), "b": ()}
    monkeypatch.setattr(board_wheels, "_download", lambda *_: [fake_wheel(tmp_path, n, *index[n]) for n in index])
    with pytest.raises(ConfigError, match=r"does not fetch .*b<1 together"):
        fetch_wheels(THIS, fake_wheel(tmp_path, "fedzo", "a"), tmp_path)


def test_what_the_board_has_is_left_out_with_what_only_that_needs(
    index: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    index |= {"numpy": (), "onnxruntime": ("numpy", "protobuf"), "protobuf": (), "paho": ()}
    own = fake_wheel(tmp_path, "fedzo", "numpy>1", "onnxruntime", "paho")
    fake_wheel(tmp_path, "unasked")  # what pip brings for this machine and the board does not need
    found = fetch_wheels(THIS, own, tmp_path, without=["numpy", "onnxruntime"])
    assert [path.name.split("-")[0] for path in found] == ["fedzo", "paho", "pip"]


@pytest.mark.parametrize(
    ("printed", "message", "hint"),
    [
        (
            "WARNING: Retrying after 'NewConnectionError(...)'\nERROR: No matching distribution found for numpy",
            "cannot reach the package index",
            "where there is a network",
        ),
        (
            "ERROR: Could not find a version (from versions: none)\nERROR: No matching distribution found for numpy>=9",
            "no wheel of numpy>=9 for Python 3.11 on aarch64 with glibc 2.28",
            "--python",
        ),
        ("/usr/bin/python3: No module named pip", "has no pip", "ensurepip"),
        ("ERROR: something else\n", "pip failed: ERROR: something else", ""),
    ],
)
def test_what_pip_says_becomes_one_line(printed: str, message: str, hint: str) -> None:
    error = board_wheels._failure(Board("aarch64", "3.11"), printed)
    assert message in error.message
    assert hint in error.hint


def test_the_own_wheel_holds_every_module_and_is_the_same_every_time(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    path = write_own_wheel(tmp_path)
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        record = wheel.read(next(name for name in names if name.endswith("RECORD"))).decode()
        assert (
            "fedzo-device = fedzo.edge_runtime.__main__:main"
            in wheel.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
        )
    modules = {f"fedzo/{file.relative_to(ROOT)}" for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert any(name.endswith("rpi-zero-2w.toml") for name in names)
    assert {line.split(",")[0] for line in record.splitlines()} == names
    assert write_own_wheel(tmp_path / "again").read_bytes() == path.read_bytes()


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("index")
def test_the_folder_is_complete_or_not_there(tmp_path: Path) -> None:
    own = fake_wheel(tmp_path, "fedzo")
    out = tmp_path / "out"
    made = make_bundle(Board("aarch64", "3.11"), out, wheel=own)
    assert made.wheels == ("fedzo-1-py3-none-any.whl", PIP)
    sums = {line[66:]: line[:64] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in sums} == sums
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {*sums, "SHA256SUMS"}
    assert json.loads((out / "bundle.json").read_text())["python"] == "3.11"

    with pytest.raises(ConfigError, match="exists"):
        make_bundle(Board("aarch64", "3.12"), out, wheel=own)
    with pytest.raises(ArtifactError):
        make_bundle(Board("aarch64", "3.12"), out, wheel=own, artifact=tmp_path, overwrite=True)
    assert json.loads((out / "bundle.json").read_text())["python"] == "3.11"
    make_bundle(Board("aarch64", "3.12"), out, wheel=own, overwrite=True)
    assert json.loads((out / "bundle.json").read_text())["python"] == "3.12"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("")
    with pytest.raises(ConfigError, match="is no bundle"):
        make_bundle(THIS, tmp_path / "mine", wheel=own, overwrite=True)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("what", ["no script", "no sums", "a file more", "a link"])
def test_only_a_bundle_is_replaced(tmp_path: Path, what: str) -> None:
    own = fake_wheel(tmp_path, "fedzo")
    out = tmp_path / "out"
    make_bundle(THIS, out, wheel=own)
    if what == "a file more":
        (out / "letter.txt").write_text("mine")
    elif what == "a link":
        out = tmp_path / "link"
        out.symlink_to("out")
    else:
        (out / {"no script": "install.sh", "no sums": "SHA256SUMS"}[what]).unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"is no bundle|which is no part of a bundle|is no folder"):
        make_bundle(THIS, out, wheel=own, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("index")
def test_a_bundle_that_cannot_take_its_place_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = fake_wheel(tmp_path, "fedzo")
    out = tmp_path / "out"
    make_bundle(Board("aarch64", "3.11"), out, wheel=own)
    rename = Path.rename

    def fails(path: Path, to: Path) -> Path:
        if path.suffix == ".new":
            raise OSError(5, "the disk is gone")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(ConfigError, match="the disk is gone"):
        make_bundle(Board("aarch64", "3.12"), out, wheel=own, overwrite=True)
    assert json.loads((out / "bundle.json").read_text())["python"] == "3.11"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--platform", "armhf", "--python", "3.13"], "no wheel of onnxruntime for 32-bit Arm", "python3-onnxruntime"),
        (["--platform", "mips"], "no platform that fedzo knows", "aarch64"),
        (["--python", "3.8"], "is not 3.10 or newer", "3.11"),
        (["--python", "3.11.2"], "is not 3.10 or newer", "3.11"),
        (["--glibc", "2.9"], "is not between", ""),
        (["--wheel", "letter.txt"], "is no wheel", ".whl"),
        (["--wheel", PIP], "is no wheel of fedzo", ""),
        (["--wheel", "fedzo-9-py3-none-any.whl"], "cannot be read", ""),
        (["--wheel", "fedzo-9-py3-none-any;reboot.whl"], "a shell might misread", "letters, digits"),
    ],
)
def test_what_cannot_be_made(
    arguments: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(["bundle", "--out", str(out), "--json", *arguments]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert message in error["message"]
    assert hint in error["hint"]
    assert not list(tmp_path.iterdir())


def test_without_a_network(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"CONFIG_FILE": os.devnull, "INDEX_URL": "http://127.0.0.1:9/", "RETRIES": "0"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    assert main(["bundle", "--out", str(tmp_path / "out"), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["message"] == "pip cannot reach the package index"
    assert not list(tmp_path.iterdir())


# --- the script -------------------------------------------------------------------------------------------------------


def test_the_script_is_for_any_posix_shell() -> None:
    dash = shutil.which("dash") or shutil.which("busybox")
    assert dash, "neither dash nor busybox is installed"
    for system_packages in ((), ("numpy", "onnxruntime")):
        text = install_script(THIS, ["fedzo-1-py3-none-any.whl", PIP], artifact=True, system_packages=system_packages)
        command = [dash, "sh"] if dash.endswith("busybox") else [dash]
        done = subprocess.run([*command, "-n"], input=text, text=True, capture_output=True, timeout=10)
        assert (done.returncode, done.stderr) == (0, "")
        assert ("--system-site-packages" in text) == ("apt install python3-numpy" in text) == bool(system_packages)


def install(folder: Path, target: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the script as a board without a network does."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "FEDZO_"))}
    kept |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PYTHON": sys.executable, **environ}
    kept.setdefault("XDG_STATE_HOME", str(target.parent / "state"))
    command = ["sh", str(folder / "install.sh"), str(target)]
    return subprocess.run(command, env=kept, cwd="/", capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for this machine, with an artifact."""
    folder = tmp_path_factory.mktemp("bundle")
    export_artifact("lenet5", (1, 16, 16), 4, 0.8, 1, folder / "artifact")
    make_bundle(THIS, folder / "out", artifact=folder / "artifact")
    return folder / "out"


@pytest.mark.network
def test_it_installs_and_checks_this_machine(made: Path, tmp_path: Path) -> None:
    done = install(made, tmp_path / "a folder")
    assert done.returncode == 0, done.stdout + done.stderr
    checks = [line.partition(": ")[0].split(maxsplit=1) for line in done.stdout.splitlines()]
    assert ["ok", "golden loss"] in checks
    assert ["ok", "golden predictions"] in checks
    python = str(tmp_path / "a folder" / "bin" / "python")
    where = [python, "-I", "-c", "import fedzo.edge_runtime as f, numpy as n; print(f.__file__, n.__file__, sep='\\n')"]
    found = subprocess.run(where, cwd="/", capture_output=True, text=True, timeout=60).stdout.splitlines()
    assert len(found) == 2
    assert all(path.startswith(str(tmp_path / "a folder")) for path in found)
    checked = subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout
    assert install(made, tmp_path / "a folder").returncode == 0  # once more, over itself


@pytest.mark.network
@pytest.mark.parametrize("what", ["damaged", "other Python", "no Python", "folder in the way", "failed check"])
def test_it_refuses_what_is_wrong(made: Path, tmp_path: Path, what: str) -> None:
    folder, target = Path(shutil.copytree(made, tmp_path / "copy")), tmp_path / "venv"
    environ = {}
    if what == "damaged":
        next((folder / "wheels").glob("numpy*")).write_bytes(b"")
    elif what == "other Python":
        script = tmp_path / "python"
        script.write_text('#!/bin/sh\necho "3.9 x86_64"\n')
        script.chmod(0o755)
        environ["PYTHON"] = str(script)
    elif what == "no Python":
        environ["PYTHON"] = "python3.99"
    elif what == "folder in the way":
        target.mkdir()
        (target / "letter.txt").write_text("")
    else:
        environ["XDG_STATE_HOME"] = os.devnull  # nowhere to keep a state
    done = install(folder, target, **environ)
    expected = {
        "damaged": (3, "this bundle is damaged: wheels/numpy"),
        "other Python": (3, "this is Python 3.9 on x86_64, the bundle is for"),
        "no Python": (3, "there is no python3.99"),
        "folder in the way": (3, "is neither empty nor an installation"),
        "failed check": (7, "this machine does not pass every check"),
    }[what]
    assert (done.returncode, expected[1] in done.stderr) == (expected[0], True), done.stdout + done.stderr

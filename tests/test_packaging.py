"""The wheel: what it holds, what it pulls in, and that a board needs nothing more."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.board_fixture import PACKAGES, ROOT, pip

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.network

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BOARD_DEPENDENCIES = {"numpy", "onnxruntime", "paho-mqtt"}
SERVER_ONLY = {"torch", "onnx", "typer", "rich", "amqtt", "onnxscript", "scikit-learn"}
CLOSURE = """
import json
from importlib.metadata import distributions
print(json.dumps({d.metadata["Name"]: d.requires or [] for d in distributions()}))
"""


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # In a folder of its own: what is imported is what is installed, never this checkout.
    return subprocess.run(
        [str(python), *arguments],
        cwd=python.parent,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def closure(requires: Mapping[str, list[str]], start: str) -> set[str]:
    """Names of a distribution and of everything that it needs without extras."""
    by_name = {canonicalize_name(name): lines for name, lines in requires.items()}
    found: set[str] = set()
    waiting = [canonicalize_name(start)]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        needed = map(Requirement, by_name[name])
        waiting += [canonicalize_name(r.name) for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return set(map(str, found))


def test_every_package_folder_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    sources = {f"fedzo/{path.relative_to(ROOT)}" for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert {name.split("/")[0] for name in names} == {"fedzo", f"fedzo-{PYPROJECT['project']['version']}.dist-info"}


def test_every_package_is_marked_as_typed_and_every_profile_is_there(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in PACKAGES:
        assert f"fedzo/{package}/py.typed" in names
        for profile in (ROOT / package).rglob("*.toml"):
            assert f"fedzo/{profile.relative_to(ROOT)}" in names


def test_a_board_gets_three_dependencies_and_what_they_need(board_venv: Path) -> None:
    requires = json.loads(run(board_venv, "-I", "-c", CLOSURE).stdout)
    installed = {canonicalize_name(name) for name in requires}
    assert installed == closure(requires, "fedzo")
    # tomli stands in for tomllib before Python 3.11.
    direct = BOARD_DEPENDENCIES | ({"tomli"} if sys.version_info < (3, 11) else set())
    assert installed == {"fedzo"}.union(*(closure(requires, name) for name in direct))
    assert not installed & SERVER_ONLY


def test_both_entry_points_exist(board_venv: Path) -> None:
    for name in PYPROJECT["project"]["scripts"]:
        assert (board_venv.parent / name).is_file()


def test_fedzo_without_its_server_part_says_how_to_get_it(board_venv: Path) -> None:
    done = run(board_venv, str(board_venv.parent / "fedzo"), "--help")
    assert (done.returncode, done.stdout) == (3, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: pip install 'fedzo[server]'")


def test_fedzo_device_helps_without_typer(board_venv: Path) -> None:
    done = run(board_venv, str(board_venv.parent / "fedzo-device"), "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: fedzo-device" in done.stdout


def test_every_board_module_imports_there(board_venv: Path) -> None:
    modules = [
        f"fedzo.{path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}"
        for package in ("protocol", "edge_runtime", "hardware_profiles")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.stem not in ("__init__", "__main__")
    ]
    assert modules
    script = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\nprint(*sys.modules)"
    done = run(board_venv, "-I", "-c", script)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "onnx", "typer", "rich"} & set(done.stdout.split())


@pytest.mark.parametrize("python_version", ["3.10", "3.11", "3.13"])
def test_arm64_boards_get_wheels_for_everything(wheel: Path, tmp_path: Path, python_version: str) -> None:
    """pip resolves for a 64-bit Arm board without compiling anything.

    pip reads environment markers with the interpreter that runs it, so this holds for markers on the Python version or
    the machine only as far as both agree.
    """
    glibc = [f"manylinux_2_{minor}_aarch64" for minor in (28, 27, 26, 24, 17)]
    platforms = [argument for tag in [*glibc, "manylinux2014_aarch64"] for argument in ("--platform", tag)]
    report = tmp_path / "report.json"
    binary_only = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python_version}", *platforms]
    nowhere = ["--dry-run", "--ignore-installed", "--quiet", f"--target={tmp_path}/never", f"--report={report}"]
    pip("install", *binary_only, *nowhere, wheel)
    found = json.loads(report.read_text())["install"]
    requires = {item["metadata"]["name"]: item["metadata"].get("requires_dist", []) for item in found}
    assert {canonicalize_name(name) for name in requires} == closure(requires, "fedzo")
    assert not {canonicalize_name(name) for name in requires} & SERVER_ONLY
    binaries = {item["download_info"]["url"] for item in found if item["metadata"]["name"] in ("numpy", "onnxruntime")}
    assert len(binaries) == 2
    assert all("aarch64" in url for url in binaries)


def test_the_pins_fit_what_the_project_asks_for() -> None:
    """Every dependency of every extra is pinned, inside the range that pyproject.toml gives."""
    pins = [
        Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in ("#", "")
    ]
    project = PYPROJECT["project"]
    wanted = [Requirement(line) for lines in project["optional-dependencies"].values() for line in lines]
    wanted += [Requirement(line) for line in project["dependencies"]]
    for requirement in wanted:
        if canonicalize_name(requirement.name) == "fedzo":
            continue
        versions = {
            str(pin.specifier).removeprefix("==")
            for pin in pins
            if canonicalize_name(pin.name) == canonicalize_name(requirement.name)
        }
        assert versions, f"{requirement.name} is not in constraints.txt"
        assert all(requirement.specifier.contains(version) for version in versions), f"{requirement}: {versions}"


def test_the_entry_points_are_installed_here_too() -> None:
    names = {entry.name for entry in entry_points(group="console_scripts") if entry.value.startswith("fedzo.")}
    assert names == set(PYPROJECT["project"]["scripts"])

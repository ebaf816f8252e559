"""``install.sh``: what it does with folders that are there, and what pip is told. pip is a stand-in, the rest real."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fedzo.exporter.board_wheels import Board
from fedzo.exporter.install_script import install_script
from fedzo.protocol.errors import ConfigError

THIS = Board(platform.machine(), f"3.{sys.version_info.minor}")
FEDZO, PIP = "fedzo-1-py3-none-any.whl", "pip-1-py3-none-any.whl"
STAND_IN = """
import os, pathlib, sys
bin = pathlib.Path(sys.executable).parent
(bin.parent / "asked.txt").write_text("\\n".join([os.environ["PIP_CONFIG_FILE"], *sys.argv[1:]]))
if os.environ.get("BROKEN") == "pip":
    sys.exit(1)
(bin / "fedzo-device").write_text("")
code = next((bin.parent / "lib").glob("python*/site-packages")) / "fedzo" / "edge_runtime"
code.mkdir(parents=True, exist_ok=True)
(code / "__main__.py").write_text("print('doctor')")
"""
"""Writes down how it was called, and installs no more than the script itself looks at."""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "wheels").mkdir(parents=True)
    with zipfile.ZipFile(folder / "wheels" / PIP, "w") as wheel:
        wheel.writestr("pip/__main__.py", STAND_IN)
    (folder / "SHA256SUMS").write_bytes(subprocess.check_output(["sha256sum", f"wheels/{PIP}"], cwd=folder))
    (folder / "install.sh").write_text(install_script(THIS, [FEDZO, PIP], artifact=False, system_packages=()))
    return folder


def install(folder: Path, target: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHON": sys.executable, **environ}
    command = ["sh", str(folder / "install.sh"), str(target)]
    return subprocess.run(command, env=environ, cwd="/", capture_output=True, text=True, timeout=60)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "foreign", ["a virtual environment", "data", "a hidden file", "a file", "a link", "a broken link"]
)
def test_nothing_that_is_there_is_touched(bundle: Path, tmp_path: Path, foreign: str) -> None:
    target = tmp_path / "venv"
    if foreign == "a file":
        target.write_text("mine")
    elif foreign.endswith("link"):
        target.symlink_to(tmp_path / "elsewhere")
        if foreign == "a link":
            (tmp_path / "elsewhere").mkdir()
    else:
        target.mkdir()
        name = {"a virtual environment": "pyvenv.cfg", "data": "letter.txt", "a hidden file": ".letter"}[foreign]
        (target / name).write_text("mine")
    before = tree(tmp_path)
    done = install(bundle, target)
    assert done.returncode == 3
    assert "is neither empty nor an installation" in done.stderr
    assert (tree(tmp_path), target.is_symlink()) == (before, foreign.endswith("link"))


@pytest.mark.parametrize("there", ["absent", "empty"])
def test_a_new_installation_is_complete_or_not_there(bundle: Path, tmp_path: Path, there: str) -> None:
    target = tmp_path / "a folder"
    if there != "absent":
        target.mkdir()
    done = install(bundle, target, BROKEN="pip")
    assert (done.returncode, "pip cannot install the wheels" in done.stderr) == (3, True), done.stderr
    assert target.exists() == (there != "absent")
    assert there == "absent" or not list(target.iterdir())
    done = install(bundle, target)
    assert (done.returncode, "doctor\n" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize("broken", ["", "pip"])
def test_an_installation_is_replaced_in_its_place(bundle: Path, tmp_path: Path, broken: str) -> None:
    target = tmp_path / "venv"
    assert install(bundle, target).returncode == 0
    assert "--force-reinstall" not in (target / "asked.txt").read_text()
    (target / "data.npz").write_text("mine")
    (target / "bin" / "mine").write_text("mine")
    before = set(tree(target))
    done = install(bundle, target, BROKEN=broken, PYTHON="python3.99")  # it has an interpreter
    assert done.returncode == (3 if broken else 0), done.stderr
    assert set(tree(target)) == before
    assert (target / "data.npz").read_text() == (target / "bin" / "mine").read_text() == "mine"
    assert "--force-reinstall" in (target / "asked.txt").read_text()


def test_an_installation_of_another_python_is_left(bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "venv"
    (target / "bin").mkdir(parents=True)
    for name, text in {"pyvenv.cfg": "", "bin/fedzo-device": "", "bin/python": "#!/bin/sh\necho 3.9 mips\n"}.items():
        (target / name).write_text(text)
    (target / "bin" / "python").chmod(0o755)
    before = tree(target)
    done = install(bundle, target)
    assert (done.returncode, "this is Python 3.9 on mips" in done.stderr) == (3, True)
    assert "another folder" in done.stderr
    assert tree(target) == before


def test_pip_reads_nothing_but_the_folder(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text("[install]\ntarget = /nowhere\n")
    assert install(bundle, tmp_path / "venv", PIP_CONFIG_FILE=str(tmp_path / "pip.conf")).returncode == 0
    asked = (tmp_path / "venv" / "asked.txt").read_text().splitlines()
    assert asked[:3] == ["/dev/null", "--isolated", "install"]
    assert {"--no-index", "--no-deps", FEDZO, PIP} <= set(asked)


@pytest.mark.parametrize(
    ("bits", "machine", "found"),
    [(32, "armv8l", "armv7l"), (32, "aarch64", "armv7l"), (32, "armv7l", "armv7l"), (64, "aarch64", "aarch64")],
)
def test_the_machine_is_that_of_the_programs(bundle: Path, tmp_path: Path, bits: int, machine: str, found: str) -> None:
    code = (
        f"import platform, struct, sys; platform.machine = lambda: {machine!r}; struct.calcsize = lambda _: {bits // 8}"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}; exec(sys.argv[1])" "$2"\n')
    python.chmod(0o755)
    board = Board("x86_64" if THIS.machine != "x86_64" else "armv7l", "3.10")
    (bundle / "install.sh").write_text(install_script(board, [PIP], artifact=False, system_packages=()))
    done = install(bundle, tmp_path / "venv", PYTHON=str(python))
    assert f"this is Python {THIS.python} on {found}, the bundle is for 3.10 on" in done.stderr


@pytest.mark.parametrize(
    "name", ["a;reboot.whl", "a b.whl", "$(reboot).whl", "a\n.whl", "a'.whl", "../a.whl", "-a.whl", "a.whl\n", "a.zip"]
)
def test_only_plain_names_are_written_into_it(name: str) -> None:
    with pytest.raises(ConfigError, match="might misread"):
        install_script(THIS, [PIP, name], artifact=False, system_packages=())
    plain = "torch-2.1.0+cpu_x-1!2-py3-none-any.whl"
    assert plain in install_script(THIS, [PIP, plain], artifact=False, system_packages=())

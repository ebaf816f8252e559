"""Installed size of a board's fedzo, and of flwr with torch, each in a fresh virtual environment.

``python -m benchmarks.footprint [--json] [--without-flower]``

Asks the package registry. Sizes are of everything that pip installs: the files in the environment's ``site-packages``
and ``bin`` that were not there before, in MB of 1e6 bytes as pip shows them, byte-compiled files included, since pip
makes them. Packages are distributions, fedzo among them. torch is the CPU build where the configured index has it; the
version is in the row. Both are installed without this project's pins.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Report

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"
TIMEOUT_S = 900


def _pip(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True).stdout


def _wheel(folder: Path) -> Path:
    """The project's wheel, built from a copy, so that nothing is written into the repository."""
    source = folder / "source"
    packages = [init.parent.name for init in ROOT.glob("*/__init__.py") if init.parent.name != "tests"]
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in packages:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    _pip("wheel", "--no-deps", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("fedzo-*.whl")
    return wheel


def installed(name: str, requirements: Sequence[str], folder: Path) -> dict[str, Any]:
    """Install into a fresh environment without pip, and count.

    Raises:
        subprocess.CalledProcessError: pip failed.
    """
    environment = folder / name
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=TIMEOUT_S)
    before = _bytes(environment)
    python = environment / "bin" / "python"
    _pip("--python", python, "install", *requirements)
    packages = json.loads(_pip("--python", python, "list", "--format", "json"))
    versions = {package["name"]: package["version"] for package in packages}
    after = _bytes(environment)
    compiled = sum(path.stat().st_size for path in environment.rglob("*.pyc"))
    return {
        "install": name,
        "mb": (after - before) / 1e6,
        "without_pyc_mb": (after - before - compiled) / 1e6,
        "packages": len(versions),
        "versions": ", ".join(f"{key} {version}" for key, version in sorted(versions.items())),
    }


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def measure(*, flower: bool) -> Report:
    """Install both."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [installed("board", [str(_wheel(folder))], folder)]
        figures = {"board_install_mb": rows[0]["mb"], "board_install_packages": float(rows[0]["packages"])}
        if flower:
            rows.append(installed("flower_torch", ["flwr", TORCH], folder))
            figures["flower_torch_install_mb"] = rows[1]["mb"]
            figures["flower_torch_install_packages"] = float(rows[1]["packages"])
            figures["flower_torch_over_board"] = rows[1]["mb"] / rows[0]["mb"]
    return Report({"torch": TORCH if flower else ""}, rows, figures)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--without-flower", action="store_true", help="measure the board's installation only")
    arguments = parser.parse_args()
    measure(flower=not arguments.without_flower).write(as_json=arguments.json)


if __name__ == "__main__":
    main()

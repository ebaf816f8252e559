"""The same bits under another numpy and on a CPU without its vector extensions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.protocol.golden.make import VECTORS
from tests.protocol.golden.round_cases import ROUNDS

ROOT = Path(__file__).parents[2]
OLD_NUMPY = "1.26.4"
MODULES = ("cases", "round_cases")


def compute(python: Path | str, path: Path, **environment: str) -> Any:
    """The golden vectors as another interpreter computes them, from this tree's protocol folder."""
    package = path / "fedzo"
    package.mkdir(parents=True)
    (package / "protocol").symlink_to(ROOT / "protocol", target_is_directory=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)]), **environment}
    found = []
    for module in MODULES:
        command = [str(python), "-W", "ignore", "-m", f"tests.protocol.golden.{module}"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    return found


def committed() -> Any:
    """The golden vectors of the repository."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in (VECTORS, ROUNDS)]


def test_bits_without_vector_extensions(tmp_path: Path) -> None:
    core = sys.modules.get("numpy._core._multiarray_umath") or sys.modules["numpy.core._multiarray_umath"]
    present = [f for f in core.__cpu_dispatch__ if core.__cpu_features__.get(f)]
    if not present:
        pytest.skip("this CPU has no extension that numpy could switch off")
    found = compute(sys.executable, tmp_path, NPY_DISABLE_CPU_FEATURES=" ".join(present))
    assert found == committed()


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(sys.version_info >= (3, 13), reason=f"numpy {OLD_NUMPY} has no wheels for this Python")
@pytest.mark.skipif(np.__version__ == OLD_NUMPY, reason=f"numpy {OLD_NUMPY} is the one that runs all other tests")
def test_bits_under_numpy_1(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, timeout=120, capture_output=True)
    python = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
    options = ["--quiet", "--disable-pip-version-check", "--only-binary=:all:", "--retries=2", "--timeout=20"]
    command = [str(python), "-m", "pip", "install", *options, f"numpy=={OLD_NUMPY}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    if done.returncode:
        pytest.skip(f"pip could not install numpy {OLD_NUMPY}: {done.stderr.strip().splitlines()[-1:]}")
    version = subprocess.run(
        [str(python), "-c", "import numpy; print(numpy.__version__)"], capture_output=True, text=True, check=True
    )
    assert version.stdout.strip() == OLD_NUMPY
    assert compute(python, tmp_path / "site") == committed()

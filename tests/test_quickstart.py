"""The commands of docs/quickstart.md, run as they stand."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tests.board_fixture import ROOT

PAGE = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_the_quick_start_works_as_it_stands(tmp_path: Path) -> None:
    for name, code in re.findall(r'^```python title="([^"]+)"\n(.*?)^```', PAGE, re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(code)
    lines = [
        line
        for block in re.findall(r"^```console\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    assert all(line.startswith("$ ") for line in lines)
    script = "\n".join(["set -e", *(line.removeprefix("$ ") for line in lines)]).replace("1883", str(free_port()))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
    shell = subprocess.Popen(
        ["bash", "-c", script], cwd=tmp_path, env=environment, start_new_session=True, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        printed, _ = shell.communicate(timeout=240)
    finally:
        # Whatever the script left in the background belongs to its session.
        if shell.poll() is None:
            os.killpg(shell.pid, 9)
    assert shell.returncode == 0, printed

    test = np.load(tmp_path / "test.npz")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    x = test["x"].astype(np.float32) / 255
    (logits,) = session.run(None, {session.get_inputs()[0].name: x})
    assert logits.shape == (360, 10)
    # Far above chance, which is 0.1; more rounds than a first try has time for reach more.
    assert float((logits.argmax(axis=1) == test["y"]).mean()) > 0.2, printed

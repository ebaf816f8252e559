"""The commands of docs/security.md, run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedzo.broker_server.security.credential_folder import CredentialFolder
from tests.board_fixture import ROOT
from tests.broker_fixtures import needs_mosquitto
from tests.end_to_end.conftest import MakeFleet
from tests.end_to_end.fleet import environment, free_port

PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


@needs_mosquitto
@pytest.mark.slow
def test_the_page_works_as_it_stands(fleets: MakeFleet) -> None:
    fleet = fleets(devices=2)
    place = fleet.folder / "place"
    place.mkdir()
    (place / "artifact").symlink_to(fleet.artifact)
    for name, data in zip(("a.npz", "b.npz"), fleet.data, strict=True):
        (place / name).symlink_to(data)
    blocks = re.findall(r"^```console\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    port = str(free_port())
    lines = [line.replace("8883", port) for line in lines]
    lines = [f"{line[:-1]} --port {port} &" if line.startswith("fedzo serve") else line for line in lines]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", "\n".join(["set -e", *lines])],
        cwd=place, env=environment(PATH=path, HOME=str(place), XDG_STATE_HOME=str(place / "state")),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all devices agree" in done.stdout + done.stderr
    assert re.search(r"state\s+done", done.stdout + done.stderr), done.stdout + done.stderr
    assert CredentialFolder(place / "credentials").registry.admitted() == {"kitchen"}
    assert len(lines) == 10

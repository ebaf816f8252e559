"""`fedzo credentials` in this process, and what `fedzo serve` and `fedzo-device` make of a wrong folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzo.broker_server.security.credential_folder import CredentialFolder
from fedzo.cli.main import main
from fedzo.edge_runtime.__main__ import main as device_main


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    found = device_main(arguments) if arguments[0] == "join" else main(arguments)
    captured = capsys.readouterr()
    assert found == code, captured.err
    assert "Traceback" not in captured.err
    return json.loads(captured.out)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = CredentialFolder.create(tmp_path / "credentials", hosts=["server.local"])
    folder.issue(["kitchen"])
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 1, 8, 8), np.float32), y=np.array([0, 1, 0, 1]))
    return folder.path


def test_from_nothing_to_a_revoked_board(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = answer(capsys, "credentials", "init", "--host", "server.local", "--days", "30", "--json")
    assert first["folder"] == str(tmp_path / "credentials")
    issued = answer(capsys, "credentials", "issue", "kitchen", "garden", "--json")
    assert issued["folders"]["garden"] == str(tmp_path / "credentials" / "devices" / "garden")
    assert issued["commands"]["garden"] == (
        "fedzo-device join mqtts://server.local:8883 --credentials garden --data DATA"
    )
    assert answer(capsys, "credentials", "revoke", "garden", "--json") == {"revoked": "garden", "admitted": ["kitchen"]}
    again = answer(capsys, "credentials", "init", "--host", "10.0.0.7", "--json")
    assert again["hosts"][0] == "10.0.0.7"
    listed = answer(capsys, "credentials", "list", "--json")
    assert listed["run_key"] == first["run_key"] == again["run_key"]
    assert [(entry["device"], entry["admitted"]) for entry in listed["devices"]] == [
        ("garden", False),
        ("kitchen", True),
    ]


def test_no_secret_is_printed(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secrets = [json.loads((made / "federation.json").read_text())["server_password"]]
    for command in (["issue", "kitchen", "attic"], ["list"], ["revoke", "attic"], ["list", "--json"], ["init"]):
        main(["credentials", *command])
        captured = capsys.readouterr()
        secrets += [json.loads(path.read_text())["password"] for path in made.glob("devices/*/device.json")]
        assert not [secret for secret in secrets if secret in captured.out + captured.err]
    assert len(set(secrets)) >= 3


@pytest.mark.parametrize(
    ("arguments", "words", "hint"),
    [
        ("credentials issue dev --folder nowhere", "no credentials folder", "fedzo credentials init"),
        ("credentials issue ../dev", "is not a valid name", "a-z"),
        ("credentials issue kitchen --days 0", "1 to 3650", ""),
        ("credentials revoke cellar", "no device 'cellar'", "fedzo credentials list"),
        ("credentials init --folder other --host a_b", "no host name", "server.local"),
        ("credentials init --folder other --federation F", "not a valid name", "a-z"),
        ("join mqtts://127.0.0.1:1 --credentials nowhere", "has no ca.pem", "fedzo credentials issue"),
        ("join mqtt://127.0.0.1:1 --credentials BUNDLE", "no mqtts://", "mqtts://"),
        ("join mqtts://127.0.0.1:1 --credentials BUNDLE --id attic", "of the device kitchen", "leave --id away"),
        ("join mqtts://127.0.0.1:1 --credentials BUNDLE --ca x", "ca is given besides", "leave one"),
        ("join mqtts://127.0.0.1:1 --credentials BUNDLE --federation f", "federation default", "leave --federation"),
        ("join mqtts://127.0.0.1:1 --run-key 12", "'12' is no public key", "64 hex digits"),
        ("join mqtts://127.0.0.1:1 --run-key " + "00" * 32, "is no public key", "64 hex digits"),
    ],
)
def test_what_does_not_fit_is_said(
    made: Path, arguments: str, words: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments.replace("BUNDLE", str(made / "devices" / "kitchen")).split()
    if given[0] == "join":
        given += ["--data", "data.npz", "--state", "state"]
    error = answer(capsys, *given, "--json", code=3)["error"]
    assert words in error["message"]
    assert hint in error["hint"]
    assert not (made.parent / "other" / "federation.json").exists()

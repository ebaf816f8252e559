"""``fedzo-device install --systemd``: the unit says what it should, and systemd understands it."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedzo.edge_runtime.__main__ import _parser, main
from fedzo.edge_runtime.installation import systemd
from fedzo.edge_runtime.installation.systemd import UnitSettings, install, unit_name, unit_text
from fedzo.hardware_profiles import load_profile
from fedzo.protocol.errors import ConfigError

URL = "mqtts://broker:8883"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "my data 100%.npz"
    path.write_bytes(b"")
    return path


def values(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def test_the_unit(data: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("password", "ca", "cert", "key")}
    settings = UnitSettings(
        URL, data, "rpi-zero-2w", id="pi-1", password_file=files["password"], ca=files["ca"], cert=files["cert"],
        key=files["key"],
    )  # fmt: skip
    unit = values(unit_text(settings, python="/opt/fedzo/bin/python"))
    assert unit["MemoryMax"] == f"{load_profile('rpi-zero-2w').ram_budget_mib + systemd.CGROUP_EXTRA_MIB}M"
    assert unit["DynamicUser"] == unit["NoNewPrivileges"] == "yes"
    assert unit["StateDirectory"] == "fedzo/default"
    assert unit["PrivateDevices"] == "yes"
    assert (unit["Type"], unit["NotifyAccess"], unit["WatchdogSec"]) == ("notify", "main", "300")
    assert unit["Restart"] == "on-failure"
    assert "MALLOC_ARENA_MAX=1" in unit["Environment"]
    words = [word.replace("%%", "%") for word in shlex.split(unit["ExecStart"])]
    assert words[:3] == ["/opt/fedzo/bin/python", "-m", "fedzo.edge_runtime"]
    options = _parser().parse_args(words[3:])  # the command line that it runs is one that join understands
    assert (options.url, options.data, options.profile, options.id) == (URL, data, "rpi-zero-2w", "pi-1")
    assert (options.ca, options.cert) == (files["ca"], files["cert"])
    assert options.state == Path("/var/lib/fedzo/default")
    # Secrets are handed over by systemd, so that only root has to be able to read them.
    assert str(options.password_file) == "${CREDENTIALS_DIRECTORY}/password"
    assert str(options.key) == "${CREDENTIALS_DIRECTORY}/key"
    assert f"LoadCredential=password:{files['password']}" in unit_text(settings)


def test_a_budget_and_a_user_of_ones_own(data: Path) -> None:
    settings = UnitSettings(
        URL, data, ram_budget_mib=96.5, user="pi", federation="home", providers=("cuda", "cpu"), strict_providers=True
    )
    unit = values(unit_text(settings))
    assert unit["MemoryMax"] == f"{97 + systemd.CGROUP_EXTRA_MIB}M"  # never below the budget
    assert unit["User"] == "pi"
    assert "DynamicUser" not in unit
    assert unit["ExecStart"].startswith(f"{sys.executable} -m fedzo.edge_runtime join {URL}")
    assert "--ram-budget-mib 96.5" in unit["ExecStart"]
    assert "--provider cuda,cpu --strict-providers" in unit["ExecStart"]
    assert unit["PrivateDevices"] == "no"  # a GPU is a device file
    assert unit_name(settings) == "fedzo-device-home.service"


@pytest.mark.parametrize(
    ("logging", "user", "line"),
    [
        ({"log_format": "json"}, "", None),
        ({"verbose": True}, "", None),
        ({"log_file": Path("/var/log/fedzo/home/device.log")}, "", ("LogsDirectory", "fedzo/home")),
        ({"log_file": Path("/var/log/fedzo/d.log"), "log_format": "json"}, "pi", ("LogsDirectory", "fedzo")),
        ({"log_file": Path("/srv/logs/d.log")}, "pi", ("ReadWritePaths", "/srv/logs")),
    ],
)
def test_the_service_logs_as_it_was_told(
    data: Path, logging: dict[str, Any], user: str, line: tuple[str, str] | None
) -> None:
    unit = values(unit_text(UnitSettings(URL, data, "rpi-zero-2w", user=user, **logging)))
    words = [word.replace("%%", "%") for word in shlex.split(unit["ExecStart"])]
    options = _parser().parse_args(words[3:])
    found = {"log_format": options.log_format or "text", "log_file": options.log_file, "verbose": options.verbose}
    assert found == {"log_format": "text", "log_file": None, "verbose": False, **logging}
    folders = {name: value for name, value in unit.items() if name in ("LogsDirectory", "ReadWritePaths")}
    assert folders == ({} if line is None else dict([line]))


@pytest.mark.parametrize(
    ("file", "user"),
    [("/srv/d.log", ""), ("/var/log/d.log", ""), ("/var/log/../lib/d.log", ""), ("/s r v/d.log", "pi")],
)
def test_a_log_that_the_service_could_not_write_is_refused(data: Path, file: str, user: str) -> None:
    with pytest.raises(ConfigError, match=r"may not write to|holds a space"):
        unit_text(UnitSettings(URL, data, "rpi-zero-2w", log_file=Path(file), user=user))


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "mqtt://user:secret@broker"},
        {"url": "http://broker"},
        {"profile": ""},
        {"profile": "", "ram_budget_mib": 0.0},
        {"federation": "A B"},
        {"id": "x y"},
        {"user": "root;"},
        {"providers": ("gpu",)},
    ],
)
def test_wrong_settings(data: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        UnitSettings(**{"url": URL, "data": data, "profile": "rpi-zero-2w", **wrong})
    assert "secret" not in caught.value.message


def test_no_value_adds_a_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds a character"):
        unit_text(UnitSettings(URL, tmp_path / "x\nUser=root", "rpi-zero-2w"))
    with pytest.raises(ConfigError, match="holds a character"):
        unit_text(UnitSettings(URL, tmp_path / "x", "rpi-zero-2w", username="a\nUser=root"))
    quoted = values(unit_text(UnitSettings(URL, tmp_path / "x", "rpi-zero-2w", username='a "$HOME" \\b')))["ExecStart"]
    assert r'--username "a \"$$HOME\" \\b"' in quoted


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_systemd_understands_it(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "fedzo-device.service"
    log = Path("/var/log/fedzo/home/d.log")
    path.write_text(unit_text(UnitSettings(URL, data, "rpi-zero-2w", password_file=data, log_file=log)))
    done = analyze("verify", path)
    assert "fedzo-device.service" not in done.stderr, done.stderr
    path.write_text(path.read_text().replace("WatchdogSec", "WatchDogSec"))
    assert "WatchDogSec" in analyze("verify", path).stderr  # it does look


def test_systemd_finds_little_exposed(data: Path, tmp_path: Path) -> None:
    """``systemd-analyze security``: 0 is a service without rights, 9.6 one without a limit."""
    path = tmp_path / "fedzo-device.service"
    path.write_text(unit_text(UnitSettings(URL, data, "rpi-zero-2w", password_file=data)))
    done = analyze("security", "--offline=yes", "--threshold=20", path)
    if "unrecognized option" in done.stderr or "not supported" in done.stderr:
        pytest.skip("this systemd-analyze cannot look at a file")  # before systemd 250
    assert done.returncode == 0, done.stdout[-400:] + done.stderr


def test_installing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    settings = UnitSettings(URL, data, "rpi-zero-2w")
    path, notes = install(settings, folder=tmp_path)
    assert path.read_text() == unit_text(settings)
    assert path.stat().st_mode & 0o777 == 0o644
    assert notes[-1].endswith("systemctl daemon-reload")
    install(settings, folder=tmp_path)  # once more changes nothing
    other = UnitSettings(URL, data, "rpi-5-8gb")
    with pytest.raises(ConfigError, match="says something else"):
        install(other, folder=tmp_path)
    install(other, folder=tmp_path, overwrite=True)
    assert "rpi-5-8gb" in path.read_text()
    with pytest.raises(ConfigError, match="cannot be written"):
        install(settings, folder=tmp_path / "none")
    with pytest.raises(ConfigError, match="does not exist"):
        install(UnitSettings(URL, tmp_path / "none", "rpi-zero-2w"), folder=tmp_path)
    with pytest.raises(ConfigError, match=r"folder of logs .* does not exist"):
        install(
            UnitSettings(URL, data, "rpi-zero-2w", log_file=tmp_path / "none" / "d.log", user="pi"), folder=tmp_path
        )


def test_the_command(data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["install", "--systemd", "--url", URL, "--data", str(data), "--profile", "rpi-zero-2w", "--dry-run"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text == unit_text(UnitSettings(URL, data, "rpi-zero-2w"))
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"unit": "fedzo-device.service", "text": text}
    assert main([*arguments, "--log-format", "json", "--log-file", "/var/log/fedzo/d.log", "--verbose"]) == 0
    logging: dict[str, Any] = {"log_format": "json", "log_file": Path("/var/log/fedzo/d.log"), "verbose": True}
    assert capsys.readouterr().out == unit_text(UnitSettings(URL, data, "rpi-zero-2w", **logging))
    monkeypatch.setattr(systemd, "UNIT_FOLDER", data.parent)
    assert main([*arguments[:-1], "--federation", "B"]) == 3
